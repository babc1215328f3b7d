#!/usr/bin/env bash
# Two nodes with two ranks each, as two network namespaces with addresses of their own, beside one
# node with four ranks: the losses must agree. Exits with 77 and the reason where this is not allowed.
#   bash tests/several_nodes.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
python=${PYTHON:-python}

skip() { echo "skipped: $1"; exit 77; }
[ "$(uname)" = Linux ] || skip "network namespaces are Linux's"
command -v ip >/dev/null || skip "there is no ip command (iproute2)"
nodes=("node0-$$" "node1-$$")
pids=()
cleanup() {
    # A launcher that waits for a dead one would outlive its namespace.
    for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
    for node in "${nodes[@]}"; do ip netns delete "$node" 2>/dev/null || true; done
}
trap cleanup EXIT
ip netns add "${nodes[0]}" 2>/dev/null || skip "this user may not make network namespaces"
ip netns add "${nodes[1]}"
ip link add "veth0-$$" netns "${nodes[0]}" type veth peer name "veth1-$$" netns "${nodes[1]}" \
    || skip "this kernel has no virtual network pairs"
for i in 0 1; do
    ip -n "${nodes[$i]}" address add "10.77.0.$((i + 1))/24" dev "veth$i-$$"
    ip -n "${nodes[$i]}" link set "veth$i-$$" up
    ip -n "${nodes[$i]}" link set lo up
done

export HF_HOME="$folder" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
unset ACCELERATE_USE_CPU GLOO_SOCKET_IFNAME
launch=("$python" -m accelerate.commands.launch)
train=(-m launch.train --aug-splits 2 --split-bn -b 8 --max-steps 4 --log-interval 1)

# Machine 0 sees the launcher's store as 10.77.0.1; gloo must not meet through the loopback device.
for i in 0 1; do
    GLOO_SOCKET_IFNAME="veth$i-$$" ip netns exec "${nodes[$i]}" "${launch[@]}" \
        --config_file launch/configs/several_nodes.yaml --mixed_precision no --num_processes 4 \
        --machine_rank "$i" --main_process_ip 10.77.0.1 "${train[@]}" --output "$folder/two-nodes" \
        >"$folder/node$i.log" 2>&1 &
    pids[i]=$!
done
for i in 0 1; do
    # Whichever ends first: its failure is the cause.
    wait -n "${pids[@]}" || { cat "$folder"/node*.log; exit 1; }
done
GLOO_SOCKET_IFNAME=lo "${launch[@]}" --config_file launch/configs/two_processes.yaml \
    --num_processes 4 "${train[@]}" --output "$folder/one-node" >"$folder/one.log" 2>&1 \
    || { cat "$folder/one.log"; exit 1; }

"$python" - "$folder" <<'PYTHON'
import json, pathlib, sys
runs = [
    json.loads((pathlib.Path(sys.argv[1]) / name / "results.json").read_text())
    for name in ("two-nodes", "one-node")
]
assert [run["ranks"] for run in runs] == [4, 4], "four ranks in both"
losses = [run["losses"] for run in runs]
largest = max(abs(a - b) for a, b in zip(*losses, strict=True))
assert len(losses[0]) == 4 and largest < 1e-5, losses
print(f"two nodes and one have the same losses within {largest:.1e}: {losses[0]}")
PYTHON
