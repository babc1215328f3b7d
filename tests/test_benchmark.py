"""The benchmark: its arithmetic, its tables and files, and that it times the right computation."""

import collections
import contextlib
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F

for package in ("matplotlib", "tqdm", "PIL"):
    pytest.importorskip(package, reason=f"the launch extra is not installed: no {package}")

from launch.benchmark import __main__ as benchmark  # noqa: E402
from launch.benchmark.cases import NETWORKS, Case, Setting, cases  # noqa: E402
from launch.benchmark.contenders import NAMES, Contender, contenders  # noqa: E402
from launch.benchmark.counts import Traffic, bytes_moved, messages_of, peak_bytes  # noqa: E402
from launch.benchmark.layers import Bench, layer_step, measure, traffic  # noqa: E402
from launch.benchmark.measure import Spread, Stopwatch, in_turn, warm_up  # noqa: E402
from launch.benchmark.model import resnet50  # noqa: E402
from launch.benchmark.options import parse_arguments  # noqa: E402
from launch.benchmark.report import WIDTH, number, summarize, table  # noqa: E402
from launch.benchmark.tables import (  # noqa: E402
    case_table,
    scaling_table,
    summary_table,
    wire_table,
)
from launch.benchmark.wire import (  # noqa: E402
    ONE_NODE,
    all_reduce_us,
    estimate,
    gathered_bytes,
    our_payloads,
    per_doubling,
    per_split_payloads,
)

CPU = torch.device("cpu")
EAGER = [name for name in NAMES if "compiled" not in name]
MEASURED = {"ours", "aten", "timm", "all-reduce", "plain"}


def setting(direction="both", splits=3, layout="nchw", network="resnet50"):
    return Setting(network, "float32", layout, splits, direction)


def able(*wanted):
    return contenders(CPU, list(wanted or EAGER))[0]


# What is normalized, and by whom


def batch_norms(model, images):
    """How many batch norms see each shape."""
    seen = collections.Counter()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, args, __: seen.update([args[0].shape[1:]]))
    model(images)
    return seen


def test_resnet50_shapes_are_those_of_the_model():
    with torch.device("meta"):
        seen = batch_norms(resnet50(), torch.empty(2, 3, 224, 224))
    assert seen == {torch.Size(shape): layers for *shape, layers in NETWORKS["resnet50"]}
    assert sum(seen.values()) == 53


def test_resnet50_has_the_size_of_the_published_one():
    with torch.device("meta"):
        assert sum(value.numel() for value in resnet50().parameters()) == 25_557_032


def test_efficientnet_b0_shapes_are_those_of_timm():
    from timm_environment import timm

    model = timm.create_model("efficientnet_b0")
    seen = batch_norms(model, torch.zeros(2, 3, 224, 224))
    assert seen == {torch.Size(shape): layers for *shape, layers in NETWORKS["efficientnet_b0"]}


def test_efficientnet_b0_has_49_layers():
    assert sum(layers for *_, layers in NETWORKS["efficientnet_b0"]) == 49


@pytest.mark.parametrize(
    ("direction", "dtype", "size", "floor"),
    [("both", "float32", 96 * 64 * 56 * 56 * 4, 8), ("forward", "bfloat16", 96 * 64 * 3136 * 2, 3)],
)
def test_floor_is_a_multiple_of_the_input(direction, dtype, size, floor):
    case = Case(Setting("resnet50", dtype, "nhwc", 3, direction), (96, 64, 56, 56), 6)
    assert (case.tensor_bytes, case.floor_bytes) == (size, floor * size)


def test_cases_cover_the_command_line_and_give_the_small_tensor_a_multiple_of_the_splits():
    options = parse_arguments(["--shapes", "small", "8x5x7", "--dtype", "float32", "bfloat16"])
    found = cases(options)
    assert len(found) == 2 * 2 * 2
    assert {one.shape for each in found.values() for one in each} == {(30, 16, 8, 8), (96, 8, 5, 7)}


def test_every_split_contender_computes_a_batch_norm_per_chunk():
    torch.manual_seed(0)
    x, dy = torch.randn(6, 4, 5, 5), torch.randn(6, 4, 5, 5)
    results = {}
    for one in able():
        leaf = x.clone().requires_grad_()
        y = one.build(4, 1 if one.name == "plain" else 3)(leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        results[one.name] = y, dx
    leaf = x.clone().requires_grad_()
    y = torch.cat([F.batch_norm(chunk, None, None, training=True) for chunk in leaf.chunk(3)])
    expected = y, torch.autograd.grad(y, leaf, dy)[0]
    assert results.keys() >= MEASURED
    del results["plain"]
    for name, result in results.items():
        for value, right in zip(result, expected, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5, msg=name)


def test_those_that_cannot_run_are_told_with_the_reason():
    names = {one.name for one in able()}
    missing = contenders(CPU, EAGER)[1]
    assert names | missing.keys() == set(EAGER)
    assert not names & missing.keys()
    assert "refuses CPU tensors" in missing["sync-bn"]


# Counting


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("forward", {"plain": 3, "timm": 5, "all-reduce": 11, "aten": 11}),
        ("both", {"plain": 8, "timm": 12, "all-reduce": 37, "aten": 25}),
    ],
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bytes_moved_are_the_passes_over_the_input(direction, expected, layout):
    moved = traffic(setting(direction, layout=layout), able(*expected), CPU)
    assert moved == pytest.approx(expected, rel=0.01)


def test_a_block_that_stays_in_the_cache_moves_once():
    x, out = torch.ones(8, 1000), torch.empty(8, 1000)

    def blocks():
        for block, target in zip(x.chunk(4), out.chunk(4), strict=True):
            torch.mul(block, 2, out=target)
            target.add_(block)

    assert bytes_moved(blocks, CPU) == 2 * x.nbytes
    with Traffic(0) as counted:
        blocks()
    assert counted.bytes == (2 + 3) * x.nbytes


def test_views_broadcasts_and_allocations_move_nothing():
    x, column = torch.ones(8, 1000), torch.ones(8, 1)
    assert bytes_moved(lambda: (x.view(-1)[3:], torch.empty(9), x.t()), CPU) == 0
    assert bytes_moved(lambda: column.expand(8, 1000).sum(), CPU) == column.nbytes + 4


def test_peak_is_what_is_held_at_once():
    x = torch.ones(1000, 1000)

    def step():
        first = x * 2
        del first
        second = x * 3
        return second + 1

    step()
    assert peak_bytes(step, CPU) == pytest.approx(2 * x.nbytes, rel=0.01)


def messages_on_ranks(rank, world_size, splits):
    """Bytes of each message of ours and of the per-split peer, in order."""
    case = Case(setting(splits=splits), (2 * splits, 5, 2, 2), 1)
    sizes = {}
    for one in able("ours", "all-reduce", "timm"):
        x, dy = case.tensor(CPU).requires_grad_(), case.tensor(CPU)
        sent = messages_of(layer_step(one, case, x, dy))
        sizes[one.name] = [message.bytes for message in sent]
    return sizes


@pytest.mark.parametrize("splits", [1, 3])
def test_payloads_of_the_estimate_are_those_that_are_sent(splits, tmp_path):
    for sizes in run_ranks(messages_on_ranks, 2, tmp_path, splits):
        assert sizes == {
            "ours": our_payloads(5, splits),
            "all-reduce": per_split_payloads(5, splits),
            "timm": [],
        }


# Timing


def test_spread_is_median_and_quartiles():
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 100.0]) == Spread(3.0, 2.0, 1.0)


class Clock(Stopwatch):
    """Calls a step, and says that it took as long as the number of calls so far."""

    calls = 0

    def __call__(self, step):
        self.calls += 1
        step()
        return float(self.calls), 0.5


def test_contenders_are_timed_in_turn_each_after_another_one():
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in "abc"}
    spreads = in_turn(steps, Clock(CPU), 3, lambda: None)
    assert "".join(order) == "abcbcacab"
    assert spreads["a"] == (Spread.of([1.0, 6.0, 8.0]), Spread(0.5, 0.0, 0.5))


def test_failed_contenders_are_reported_and_the_others_measured():
    def refuses(features, splits):
        raise AssertionError(f"no {splits} splits\nhere")

    class Breaks(nn.Identity):
        def forward(self, input):
            raise RuntimeError

    wanted = [
        Contender("timm", "", refuses),
        Contender("aten", "", lambda *_: Breaks()),
        *able("ours", "plain"),
    ]
    ticks = []
    bench = Bench(CPU, Stopwatch(CPU), 1, lambda: ticks.append(0))
    case = Case(setting(splits=2), (4, 3, 2, 2), 1)
    result = measure(case, wanted, bench)
    assert result["failed"] == {"timm": "AssertionError: no 2 splits", "aten": "RuntimeError"}
    assert result["contenders"].keys() == {"ours", "plain"}
    assert len(ticks) == bench.ticks([case], 4)
    assert "  timm            failed: AssertionError: no 2 splits" in case_table(result)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc's mallopt")
def test_kept_memory_costs_no_page_faults_when_it_is_taken_again():
    program = """
import resource, torch
from launch.benchmark.measure import keep_memory
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty(2**25, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
usual, kept = faults(5), keep_memory()
faults(20)
print(usual, kept, faults(5))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    usual, kept, after = found.stdout.split()
    # Of pages as small as 4 KiB there are 8,192; the system may take larger ones.
    assert kept == "True"
    assert int(after) * 100 < int(usual), found.stdout


def test_steps_are_called_before_they_are_timed():
    calls = []
    steps, failed = warm_up({"a": lambda: lambda: calls.append(0)}, lambda: None)
    assert (list(steps), failed, bool(calls)) == (["a"], {}, True)


# Tables


def measured(ours, peer, layers):
    rows = {
        name: {
            "median_ms": time,
            "iqr_ms": time / 10,
            "floor_gb_per_s": 12.5,
            "of_copy": 0.5,
            "peak_bytes": 300,
            "collectives": 2,
            "collectives_median_ms": 0.25,
        }
        for name, time in {"ours": ours, "timm": peer}.items()
        if time
    }
    failed = {} if peer else {"timm": "RuntimeError: " + "long " * 40}
    return {
        "shape": [96, 2048, 112, 112],
        "layers": layers,
        "tensor_bytes": 100,
        "copy": {"gb_per_s": 8},
        "contenders": rows,
        "failed": failed,
    }


def of_settings(*listed):
    traffic = {"ours": None, "timm": 12.0}
    return {"title": str(setting()), "direction": "both", "traffic": traffic, "cases": listed}


def test_summary_weights_by_layers_and_means_ratios_geometrically():
    rows = summarize(of_settings(measured(2.0, 4.0, 3), measured(10.0, 5.0, 1)))
    assert rows["ours"]["step_ms"] == pytest.approx(3 * 2 + 10)
    assert rows["timm"]["step_ms"] == pytest.approx(3 * 4 + 5)
    assert rows["timm"]["step_iqr_ms"] == pytest.approx(1.7)
    assert rows["timm"]["ours_is"] == pytest.approx((2 * 0.5) ** 0.5)
    assert rows["timm"]["ours_is_at_least"] == pytest.approx(0.5)
    assert (rows["timm"]["collectives"], rows["timm"]["collectives_ms"]) == (8, 1.0)
    assert (rows["timm"]["moved_v"], rows["ours"]["moved_v"]) == (12.0, None)


def test_summary_has_no_sum_where_a_shape_is_missing():
    rows = summarize(of_settings(measured(2.0, 4.0, 3), measured(10.0, None, 1)))
    assert rows["timm"]["step_ms"] is None
    assert rows["timm"]["ours_is"] == pytest.approx(2.0)


def test_tables_fit_a_terminal_and_show_what_they_should():
    case = measured(12_345.678, 4.0, 11)
    lines = [*case_table(case), *case_table(measured(1.0, None, 1))]
    lines += summary_table(of_settings(case, case))
    assert max(map(len, lines)) <= WIDTH
    rows = [" ".join(line.split()) for line in lines if line.startswith("  timm")]
    assert rows[0] == "timm 4.00 0.400 0.00x 12.5 50% 3.00 2 0.250"
    assert rows[1].startswith("timm failed: RuntimeError: long long")
    assert rows[2] == "timm 88.0 8.80 0.00x 0.00x 12.0 1.50x 44 5.50"
    assert lines[1] == "[96, 2048, 112, 112], 11 layers: V = 0.0001 MB, copied at 8 GB/s"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (106, "106"),
        (0.0, "0"),
        (0.00123, "0.0012"),
        (0.5, "0.500"),
        (1.8349, "1.83"),
        (12.34, "12.3"),
        (12345.6, "12,346"),
    ],
)
def test_numbers_have_three_digits_that_count(value, text):
    assert number(value) == text


def test_columns_are_aligned():
    lines = table([("", 4), ("ms", 8)], [["a", 1.0], ["b", None]])
    assert lines == ["            ms", "  a       1.00", "  b          -"]


# The estimate


def test_estimate_passes_through_the_published_points():
    for size, time in ONE_NODE:
        assert all_reduce_us(8, size) == pytest.approx(time)
    assert all_reduce_us(16, 1024) == pytest.approx(47.0)
    assert all_reduce_us(1, 1024) == 0


def test_estimate_grows_by_the_same_for_every_doubling_of_nodes():
    for gpus in (8, 64, 8192):
        step = all_reduce_us(2 * gpus, 4096) - all_reduce_us(gpus, 4096)
        assert step == pytest.approx(per_doubling())


def test_estimate_of_a_network_adds_both_messages_of_every_layer():
    rows = {row["gpus"]: row for row in estimate([64, 64, 2048], splits=3)}
    assert list(rows) == [8, 64, 512, 1024, 4096, 16384]
    sizes = [3 * 129 * 8, 3 * 128 * 4] * 2 + [3 * 4097 * 8, 3 * 4096 * 4]
    ours = sum(all_reduce_us(512, size) for size in sizes) / 1e3
    split = 6 * (2 * all_reduce_us(512, 512) + all_reduce_us(512, 16384)) / 1e3
    assert rows[512]["ours"] == pytest.approx(ours)
    assert rows[512]["per_split"] == pytest.approx(split)
    assert rows[512]["sync_group_64"] == pytest.approx(rows[64]["ours"])
    assert rows[16384]["sync_group_8"] == pytest.approx(rows[8]["ours"])
    assert rows[64]["sync_group_64"] is None, "64 GPUs are one group"
    assert rows[8]["gathered_bytes"] == 3 * 8 * 4 * (2 * 129 + 4097)
    assert gathered_bytes(2048, 1, 256) == 256 * 4097 * 4


def test_estimate_is_called_one_and_names_its_inputs():
    lines = wire_table({3: estimate([64] * 53, 3)}, "resnet50, 53 batch norms")
    text = "\n".join(lines)
    assert "ESTIMATE, not measured" in text
    assert "Triton-distributed#57" in text
    assert "nccl#1244" in text
    assert "16,384" in text
    assert max(map(len, lines)) <= WIDTH


# Whole runs


def printed(rank, world_size, arguments, model=None):
    """What `launch.benchmark` prints as a rank, with a small network in ResNet-50's place."""
    torch.set_num_threads(1)
    if model is not None:
        from launch.benchmark import model as benchmark_model

        benchmark_model.architecture = lambda: (model, "the test")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert benchmark.main(arguments) == 0
    return output.getvalue()


def width(text):
    """Columns of the widest line, but for the one that ends in a path of pytest's."""
    return max(len(line) for line in text.splitlines() if not line.startswith("written:"))


def run(tmp_path, world_size, name, *options, model=None):
    arguments = ["--device", "cpu", "--repeats", "1", "--output", str(tmp_path / "run"), *options]
    texts = run_ranks(printed, world_size, tmp_path, arguments, model)
    assert not any(texts[1:]), "only the main process prints"
    assert width(texts[0]) <= WIDTH
    assert (tmp_path / "run" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    results = json.loads((tmp_path / "run" / f"{name}.json").read_text())
    assert results["ranks"] == world_size
    assert results["versions"]["torch"] == torch.__version__
    assert {"date", "command", "device_name", "threads", "contenders", "not_run"} <= results.keys()
    return results, texts[0]


def sent(rows):
    return {name: row["collectives"] for name, row in rows.items()}


LAYERS = ["--shapes", "4x3x3", "5x2x2", "small", "--batch-size", "6", "--layout", "nhwc"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_layers_run_writes_its_files_and_counts_messages(world_size, tmp_path):
    results, text = run(tmp_path, world_size, "layers", *LAYERS, "--contenders", *EAGER)
    listed = results["settings"][1]
    assert [case["shape"] for case in listed["cases"]] == [[6, 4, 3, 3], [6, 5, 2, 2]]
    rows = listed["cases"][0]["contenders"]
    assert rows.keys() >= MEASURED
    assert rows.keys() | results["not_run"].keys() == set(EAGER)
    messages = {"ours": 2, "aten": 2, "timm": 0, "all-reduce": 6, "plain": 0}
    if world_size > 1:
        messages["own-group"] = 2
    counted = {name: number if world_size > 1 else 0 for name, number in messages.items()}
    assert sent(rows).items() >= counted.items()
    assert rows["ours"]["median_ms"] > 0
    assert rows["ours"]["peak_bytes"] >= 2 * listed["cases"][0]["tensor_bytes"]
    assert listed["summary"]["ours"]["collectives"] == 2 * counted["ours"]
    assert "float32 nhwc, 3 splits, forward + backward" in text
    assert all(f"  {name}" in text for name in EAGER), "none is skipped without a word"


def test_layers_run_with_one_rank_can_post_collectives(tmp_path):
    options = [*LAYERS, "--contenders", "ours", "all-reduce", "plain", "--collectives-alone"]
    results, _ = run(tmp_path, 1, "layers", *options)
    rows = results["settings"][1]["cases"][0]["contenders"]
    assert sent(rows) == {"ours": 2, "all-reduce": 6, "plain": 0}
    assert rows["ours"]["collective_bytes"] == sum(our_payloads(4, 3))


def small_network():
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *pooled)


def test_model_run_trains_with_ddp_and_counts_the_batch_norms_messages(tmp_path):
    options = ["--model", "--batch-size", "6", "--image-size", "8", "--layout", "nchw"]
    options += ["--dtype", "float32", "bfloat16", "--contenders", *EAGER]
    results, text = run(tmp_path, 2, "model", *options, model=small_network)
    assert [each["dtype"] for each in results["settings"]] == ["float32", "bfloat16"]
    for each in results["settings"]:
        assert each["failed"] == {}
        expected = {"ours": 2, "own-group": 2, "timm": 0, "all-reduce": 6, "plain": 0}
        assert sent(each["contenders"]).items() >= expected.items()
    assert "model by the test" in text
    assert "2 ranks share" in text


def test_scaling_run_measures_ranks_it_starts(tmp_path, capsys):
    arguments = ["--scaling", "1", "2", "--splits", "1", "3", "--shapes", "small", "--repeats", "1"]
    assert benchmark.main([*arguments, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "scaling.json").read_text())
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    counts = {
        (row["ranks"], row["splits"], row["contender"]): row["collectives"]
        for row in results["measured"]
    }
    for splits in (1, 3):
        assert counts[1, splits, "ours"] == counts[1, splits, "all-reduce"] == 0
        assert counts[2, splits, "ours"] == 2
        assert counts[2, splits, "all-reduce"] == 2 * splits
    text = capsys.readouterr().out
    assert "share the" in text
    assert "ESTIMATE" in text
    assert width(text) <= WIDTH


def test_scaling_table_compares_ours_with_a_message_per_split():
    rows = [
        {
            "ranks": 8,
            "splits": 3,
            "contender": name,
            "collectives": count,
            "bytes": 1_500_000,
            "median_ms": time,
            "iqr_ms": 1.0,
        }
        for name, count, time in (("ours", 106, 1000.0), ("all-reduce", 318, 2500.0))
    ]
    lines = scaling_table(rows, "resnet50")
    assert max(map(len, lines)) <= WIDTH
    assert " ".join(lines[-1].split()) == "8 3 106 1.50 1,000 1.00 318 1.50 2,500 1.00 2.50x"


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "32"], "--batch-size must be divisible by --splits 3, got 32"),
        (["--shapes", "64x56"], "--shapes must be among .* or CxHxW such as 64x56x56, got 64x56"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--splits", "2", "0"], "--splits must be at least 1, got 0"),
        (["--scaling", "--shapes", "8x8x8"], "must begin with a network for --scaling, got 8x8x8"),
        (["--model", "--scaling"], "not allowed with argument"),
    ],
)
def test_wrong_options_are_refused_with_the_reason(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert re.search(message, capsys.readouterr().err)
