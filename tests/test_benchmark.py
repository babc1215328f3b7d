"""The benchmark: its arithmetic, its tables and files, and that it times the right computation."""

import collections
import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F

for package in ("matplotlib", "tqdm", "PIL"):
    pytest.importorskip(package, reason=f"the launch extra is not installed: no {package}")

from launch.benchmark import __main__ as benchmark  # noqa: E402
from launch.benchmark.implementations import NAMES, Implementation, available  # noqa: E402
from launch.benchmark.layers import layer_step, measure_case  # noqa: E402
from launch.benchmark.model import resnet50  # noqa: E402
from launch.benchmark.options import parse_arguments  # noqa: E402
from launch.benchmark.report import summarize, table  # noqa: E402
from launch.benchmark.shapes import NETWORKS, Case, Setting, cases  # noqa: E402
from launch.benchmark.timing import as_json, in_turn, messages_of, warm_up  # noqa: E402

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
EAGER = [name for name in NAMES if "compiled" not in name]
SETTING = Setting("resnet50", "float32", "nchw", 3)


# What is normalized, and by what


def test_resnet50_shapes_are_those_of_the_model():
    found = collections.Counter()
    model = resnet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda module, args: found.update([tuple(args[0].shape[1:])])
            )
    model.eval()(torch.zeros(1, 3, 224, 224))
    assert found == {shape[:3]: shape[3] for shape in NETWORKS["resnet50"]}


def test_resnet50_has_the_size_of_the_published_one():
    assert sum(parameter.numel() for parameter in resnet50().parameters()) == 25_557_032


def test_efficientnet_b0_has_49_layers():
    assert sum(layers for *_, layers in NETWORKS["efficientnet_b0"]) == 49


def test_cases_cover_the_command_line_and_give_the_small_tensor_a_multiple_of_the_splits():
    options = parse_arguments(["--shapes", "small", "8x5x7", "--dtype", "float32", "bfloat16"])
    found = cases(options)
    assert len(found) == 2 * 2 * 2
    shapes = {case.shape for each in found.values() for case in each}
    assert shapes == {(30, 16, 8, 8), (96, 8, 5, 7)}


def test_every_implementation_computes_a_batch_norm_for_each_chunk():
    torch.manual_seed(0)
    x, dy = torch.randn(6, 4, 5, 5), torch.randn(6, 4, 5, 5)
    results = {}
    for each in available(CPU, EAGER)[0]:
        leaf = x.clone().requires_grad_()
        y = each.build(4, 1 if each.name == "plain" else 3)(leaf)
        results[each.name] = y, torch.autograd.grad(y, leaf, dy)[0]
    assert results.keys() >= {"ours", "aten", "timm", "all-reduce", "plain"}
    for name, result in results.items():
        leaf = x.clone().requires_grad_()
        chunks = leaf.chunk(1 if name == "plain" else 3)
        y = torch.cat([F.batch_norm(chunk, None, None, training=True) for chunk in chunks])
        expected = y, torch.autograd.grad(y, leaf, dy)[0]
        for value, right in zip(result, expected, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5, msg=name)


def test_what_cannot_run_here_is_named_with_the_reason():
    able, missing = available(CPU, ["ours", "triton", "sync-bn"])
    assert [each.name for each in able] == ["ours"]
    assert missing.keys() == {"triton", "sync-bn"}
    assert missing["triton"].startswith("RuntimeError: impl='triton' must")


def test_step_is_a_whole_training_step_of_the_layer():
    case = Case(SETTING, (6, 4, 3, 3), 1)
    (ours,) = available(CPU, ["ours"])[0]
    x, dy = case.tensor(CPU).requires_grad_(), case.tensor(CPU)
    gradients = layer_step(ours, case, x, dy)()
    assert [tuple(each.shape) for each in gradients] == [(6, 4, 3, 3)] + [(4,)] * 6


# How it is timed


def test_implementations_are_timed_in_turn_and_as_often():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    ticks = []
    times = in_turn(steps, 3, lambda: ticks.append(1))
    assert len(ticks) == 6
    assert all(len(times[name].times) == 3 for name in "ab")
    # Each round has a block of one and a block of the other.
    blocks = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    # The first two try each once; the order turns with the rounds.
    assert blocks == ["a", "b", "a", "b", "a", "b"]
    assert calls[-1] == "b"


def test_times_are_median_and_interquartile_range():
    (measured,) = in_turn({"sleep": lambda: None}, 5).values()
    times = [0.001, 0.002, 0.003, 0.004, 0.100]
    assert as_json(type(measured)(1, times, measured.task_spec)) == pytest.approx(
        {"median_ms": 3.0, "iqr_ms": 2.0}
    )


def test_what_fails_is_reported_and_the_others_are_measured():
    def build(features, splits):
        raise KeyError("no such thing")

    case = Case(SETTING, (6, 4, 3, 3), 2)
    able = [*available(CPU, ["ours", "plain"])[0], Implementation("broken", "", build)]
    found = measure_case(case, able, CPU, 2)
    assert found["failed"] == {"broken": "KeyError: 'no such thing'"}
    assert found["contenders"].keys() == {"ours", "plain"}
    assert found["layers"] == 2
    lines = "\n".join(table("title", {"median_ms": ".1f"}, found))
    assert "broken" in lines
    assert "no such thing" in lines


def test_warm_up_calls_every_step():
    calls = []
    steps, failed = warm_up({"a": lambda: lambda: calls.append(1)})
    assert calls
    assert not failed
    assert steps.keys() == {"a"}


def messages(rank, world_size):
    case = Case(SETTING, (6, 4, 3, 3), 1)
    x, dy = case.tensor(CPU), case.tensor(CPU)
    return {
        each.name: [
            (tensor.numel(), tensor.dtype)
            for tensor in messages_of(layer_step(each, case, x.clone().requires_grad_(), dy))
        ]
        for each in available(CPU, ["ours", "all-reduce", "timm"])[0]
    }


def test_messages_are_those_that_the_layers_send(tmp_path):
    found = run_ranks(messages, 2, tmp_path)[0]
    assert found["ours"] == [(3 * (2 * 4 + 1), torch.float64), (2 * 3 * 4, torch.float32)]
    assert found["all-reduce"] == [(8, torch.float32)] * 6
    assert found["timm"] == []


def test_summary_weights_by_layers_and_means_ratios_geometrically():
    def case(layers, **times):
        rows = {name: {"median_ms": time} for name, time in times.items()}
        return {"layers": layers, "contenders": rows}

    found = summarize([case(2, ours=1.0, timm=2.0), case(3, ours=4.0, timm=2.0)])
    assert found["ours"]["step_ms"] == 14
    assert found["timm"] == pytest.approx(
        {"step_ms": 10.0, "time_by_ours": 1.0, "time_by_ours_least": 0.5}
    )
    # Without a shape there is no sum.
    assert "timm" not in summarize([case(1, timm=2.0, ours=1.0), case(1, ours=1.0)])


def test_table_has_aligned_columns_and_a_dash_for_what_is_not_known():
    rows = {"a": {"x_ms": 1.234, "n": None}, "longer": {"x_ms": 123.4, "n": 5}}
    _, heading, *lines = "\n".join(
        table("title", {"x_ms": ".1f", "n": "d"}, {"contenders": rows})
    ).splitlines()[0:]
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[1].split() == ["a", "1.2", "-"]
    assert heading == "title"


# Whole runs


def printed(rank, world_size, arguments):
    """What `launch.benchmark` prints as a rank, with a small network in ResNet-50's place."""
    torch.set_num_threads(1)
    from launch.benchmark import model

    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000)
    model.resnet50 = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *pooled)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert benchmark.main(arguments) == 0
    return output.getvalue()


def run(tmp_path, world_size, name, *options):
    arguments = ["--device", "cpu", "--repeats", "1", "--output", str(tmp_path / "run"), *options]
    texts = run_ranks(printed, world_size, tmp_path, arguments)
    assert not any(texts[1:]), "only the main process prints"
    assert (tmp_path / "run" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    results = json.loads((tmp_path / "run" / f"{name}.json").read_text())
    assert results["ranks"] == world_size
    assert results["versions"]["torch"] == torch.__version__
    assert {"date", "command", "device_name", "threads", "contenders", "not_run"} <= results.keys()
    return results, texts[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_layers_run_writes_its_files_and_counts_messages(world_size, tmp_path):
    options = ["--shapes", "4x3x3", "5x2x2", "small", "--batch-size", "6", "--layout", "nhwc"]
    results, text = run(tmp_path, world_size, "layers", *options, "--contenders", *EAGER)
    listed = results["settings"][1]
    assert [case["shape"] for case in listed["cases"]] == [[6, 4, 3, 3], [6, 5, 2, 2]]
    rows = listed["cases"][0]["contenders"]
    assert rows.keys() | results["not_run"].keys() == set(EAGER)
    sent = {"ours": 2, "aten": 2, "timm": 0, "all-reduce": 6, "plain": 0}
    for name, number in sent.items():
        assert rows[name]["collectives"] == (number if world_size > 1 else 0)
    assert rows["ours"]["median_ms"] > 0
    assert listed["summary"].keys() == rows.keys()
    assert all(f"  {name}" in text for name in EAGER), "none is skipped without a word"


def test_model_run_trains_with_ddp(tmp_path):
    options = ["--model", "--batch-size", "6", "--image-size", "8", "--layout", "nchw"]
    options += ["--dtype", "float32", "bfloat16", "--contenders", *EAGER]
    results, _ = run(tmp_path, 2, "model", *options)
    assert [each["dtype"] for each in results["settings"]] == ["float32", "bfloat16"]
    for each in results["settings"]:
        (case,) = each["cases"]
        assert case["failed"] == {}
        assert case["contenders"]["ours"]["images_per_s"] > 0


def test_scaling_run_measures_ranks_it_starts(tmp_path):
    arguments = ["--scaling", "1", "2", "--splits", "1", "3", "--shapes", "small", "--repeats", "1"]
    assert benchmark.main([*arguments, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "scaling.json").read_text())
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    alone, two = (setting["cases"][0]["contenders"] for setting in results["settings"])
    assert all(row["collectives"] == 0 for row in alone.values())
    assert {name: row["collectives"] for name, row in two.items()} == {
        "ours, 1 split(s)": 2,
        "all-reduce, 1 split(s)": 2,
        "ours, 3 split(s)": 2,
        "all-reduce, 3 split(s)": 6,
    }


# The command line


def test_every_command_that_is_printed_is_understood():
    commands = re.findall(
        r"-m launch\.benchmark ([^`]+?)`", " ".join((ROOT / "README.md").read_text().split())
    )
    results = sorted((ROOT / "launch" / "results").rglob("*.json"))
    stored = [json.loads(file.read_text()).get("command", "") for file in results]
    commands += [
        text.partition("-m launch.benchmark ")[2] for text in stored if "benchmark" in text
    ]
    assert len(commands) > 5
    for command in commands:
        if command != "--help":
            parse_arguments(shlex.split(command))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_one_line(tmp_path):
    ((code, said),) = run_ranks(refused, 1, tmp_path, ["--device", "cuda", "--shapes", "small"])
    assert code == 2
    assert re.fullmatch(r"error: --device cuda must be there for each of 1 ranks, got 0 .*\n", said)


def refused(rank, world_size, arguments):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = benchmark.main(arguments)
    return code, said.getvalue()


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
