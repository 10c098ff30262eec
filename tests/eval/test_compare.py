"""The comparison: rows and their schema, names, kept figures, plots, model cards."""

import importlib.util
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from casp_eval import compare, perplexity, plots, questions, report
from casp_eval.compare import Subject, content_fingerprint, main
from casp_eval.loading import open_checkpoint
from PIL import Image

from casp.model.checkpoint import size
from casp.run.card import RESULTS_BEGIN, RESULTS_END

TEXT = "the quick brown fox jumps over the lazy dog. " * 12
SCHEMA = {
    "model": str,
    "method": str,
    "bpw": float,
    "bytes": int,
    "perplexity_text": float,
    "perplexity_image_text": float,
    "accuracy": float,
    "questions": int,
}
ENTIRE = {"quant_method": "casp", "version": 1, "original_weights": 1}


@pytest.fixture
def arguments(pictures, tmp_path):
    """Options of a small comparison, all but the checkpoints."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--output", tmp_path / "out", "--text", text, "--questions-file", pictures, "--windows", 3]
    return [*map(str, options), "--sequence-length", "16", "--batch-size", "4", "--max-new-tokens", "3"]


def run(checkpoints, arguments):
    main([*map(str, checkpoints), *arguments])
    folder = arguments[arguments.index("--output") + 1]
    with open(f"{folder}/report.json") as file:
        return json.load(file)


def picture(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_report_has_the_rows_asked_for(tiny_llava, low_rank_llava, tiny_llama, arguments, tmp_path, capsys):
    rows = run([tiny_llava, low_rank_llava, f"small={tiny_llama}"], arguments)
    for row in rows[:2]:
        assert all(isinstance(row[key], kind) for key, kind in SCHEMA.items())
    assert [(row["model"], row["method"]) for row in rows] == [
        ("tiny-llava", "fp32"),
        ("tiny-llava", "SVD 25%"),
        ("tiny-llama", "small"),
    ]
    assert (rows[2]["perplexity_image_text"], rows[2]["accuracy"], rows[2]["questions"]) == (None, None, None)
    assert rows[0]["bpw"] == 32
    assert rows[1]["bytes"] == size(low_rank_llava).bytes < rows[0]["bytes"]
    printed = capsys.readouterr().out
    assert printed.startswith(report.table(rows))
    text = (tmp_path / "out/report.md").read_text()
    assert report.table(rows) in text
    assert report.kinds_table(rows) in text
    assert f"bash eval/scripts/compare.sh {tiny_llava} {low_rank_llava} small={tiny_llama} --output" in text
    for name in ("quality_vs_bpw", "bits_and_ranks", "attention_density"):
        assert f"]({name}.png)" in text
        pixels = picture(tmp_path / f"out/{name}.png")
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # lines, markers and letters, not a blank sheet


def test_several_texts_are_scored_each_on_its_own(tiny_llama, arguments, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("pack my box with five dozen liquor jugs. " * 12)
    both = run([tiny_llama], [*arguments, "--text", str(other)])
    (row,), (first,) = both, run([tiny_llama], arguments)
    (second,) = run([tiny_llama], [*arguments[:2], "--text", str(other), *arguments[4:]])
    assert list(row["perplexity_texts"].values()) == [first["perplexity_text"], second["perplexity_text"]]
    assert row["perplexity_text"] == first["perplexity_text"] != second["perplexity_text"]
    head = report.table(both).splitlines()[0]
    assert head.index("perplexity of text") < head.index("perplexity of other")


def test_figures_are_those_of_the_single_scripts(tiny_llava, arguments, pictures):
    row = run([tiny_llava], arguments)[0]
    checkpoint = open_checkpoint(str(tiny_llava), "cpu", "float32")
    items = compare.sources.evaluation_chats(str(pictures), 0, 0)
    expected = questions.accuracy(items, questions.answers(checkpoint, items, 2, 3))
    assert (row["accuracy"], row["kinds"]) == (expected["accuracy"], expected["kinds"])
    perplexity = questions.answer_perplexity(checkpoint, items, 2)["perplexity"]
    assert row["perplexity_image_text"] == pytest.approx(perplexity, rel=1e-5)


def test_an_interrupted_comparison_resumes_and_a_repeated_one_measures_nothing(
    tiny_llava, low_rank_llava, arguments, monkeypatch, tmp_path
):
    measured = []
    for module, name in ((compare, "text_perplexity"), (questions, "answer_perplexity"), (questions, "answers")):
        own = getattr(module, name)

        def count(checkpoint, *rest, own=own, name=name, **named):
            if len(measured) == 4:
                measured.append("interrupt")
                raise KeyboardInterrupt
            measured.append(name)
            return own(checkpoint, *rest, **named)

        monkeypatch.setattr(module, name, count)
    both = [tiny_llava, low_rank_llava]
    with pytest.raises(KeyboardInterrupt):
        run(both, arguments)
    assert not (tmp_path / "out/report.json").exists()
    first = run(both, arguments)
    assert measured == [
        *("text_perplexity", "answer_perplexity", "answers", "text_perplexity", "interrupt"),
        *("answer_perplexity", "answers"),
    ]
    monkeypatch.setattr(compare, "open_checkpoint", None)  # nothing may be loaded
    assert run(both, arguments) == first


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (["--windows", "2"], ["text"]),
        (["--sequence-length", "20"], ["text"]),
        (["--max-new-tokens", "2"], ["accuracy"]),
        (["--questions", "4"], ["answers", "accuracy"]),
        (["--dtype", "bfloat16"], ["text", "answers", "accuracy"]),
        (["--batch-size", "1"], []),
    ],
)
def test_figures_are_kept_per_setting(tiny_llava, arguments, tmp_path, change, again):
    run([tiny_llava], arguments)
    before = set((tmp_path / "out/figures").iterdir())
    run([tiny_llava], [*arguments, *change])
    new = set((tmp_path / "out/figures").iterdir()) - before
    assert sorted(path.name.split("-")[0] for path in new) == sorted(again)


def test_seed_changes_which_questions_are_asked(tiny_llava, arguments):
    asked = [run([tiny_llava], [*arguments, "--questions", "3", "--seed", seed])[0]["kinds"] for seed in ("0", "2")]
    assert asked[0] != asked[1]


def test_a_damaged_kept_figure_is_measured_again(tiny_llama, arguments, tmp_path):
    first = run([tiny_llama], arguments)
    kept = next((tmp_path / "out/figures").iterdir())
    kept.write_text(kept.read_text()[:40])
    assert run([tiny_llama], arguments) == first


def test_fingerprint_follows_the_content(tiny_llama, tmp_path):
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    assert content_fingerprint(copy) == content_fingerprint(tiny_llama)
    (copy / "README.md").write_text("measured")
    assert content_fingerprint(copy) == content_fingerprint(tiny_llama)
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert content_fingerprint(copy) != content_fingerprint(tiny_llama)


def test_cards_are_updated_between_their_markers(tiny_llava, low_rank_llava, arguments, tmp_path):
    folder = shutil.copytree(low_rank_llava, tmp_path / "checkpoint")
    before = (folder / "README.md").read_text()
    rows = run([tiny_llava, folder], [*arguments, "--update-cards"])
    after = (folder / "README.md").read_text()
    assert report.table(rows, rows[1]) in after
    assert "| **tiny-llava** | **SVD 25%** |" in after
    assert after.split(RESULTS_BEGIN)[0] == before.split(RESULTS_BEGIN)[0]
    assert after.split(RESULTS_END)[1] == before.split(RESULTS_END)[1]
    assert not (tiny_llava / "README.md").exists()  # a checkpoint that CASP did not make is left alone
    run([tiny_llava, folder], [*arguments, "--update-cards"])
    assert (folder / "README.md").read_text() == after


def test_a_card_without_markers_is_refused(low_rank_llava, refused, arguments, tmp_path):
    folder = shutil.copytree(low_rank_llava, tmp_path / "checkpoint")
    (folder / "README.md").write_text("my own card")
    assert "has no model card with the markers" in refused(main, folder, *arguments, "--update-cards")
    assert (folder / "README.md").read_text() == "my own card"


@pytest.mark.parametrize(
    ("compression", "method"),
    [
        ({**ENTIRE, "backend": None, "modules": {"a": {"rank": 3}}}, "SVD 40%"),
        ({**ENTIRE, "backend": "gptq", "modules": {"a": {"format": {"bits": 2, "group_size": 64}}}}, "GPTQ 2-bit g64"),
        (
            {
                **ENTIRE,
                "backend": "gptq",
                "modules": {
                    "a": {"rank": 3},
                    "a.up": {"format": {"bits": 2, "group_size": 64}},
                    "b": {"format": {"bits": 3, "group_size": 64}},
                },
            },
            "CASP-GPTQ 2-3-bit g64",
        ),
        ({**ENTIRE, "backend": "toy", "modules": {"a": {"format": {"levels": 4}}}}, "toy"),
        ({**ENTIRE, "backend": "gptq", "modules": {"a": {"format": {"bits": 4, "group_size": -1}}}}, "GPTQ 4-bit"),
    ],
)
def test_method_names(compression, method):
    stages = {"stages": [{"stage": "svd", "settings": {"keep_ratio": 0.4}}]}
    assert report.method_name(SimpleNamespace(quantization_config=compression), stages) == method


def test_checkpoint_arguments(tiny_llama, tmp_path):
    assert Subject.parse(f"mine={tiny_llama}") == Subject(str(tiny_llama), tiny_llama, "mine")
    odd = shutil.copytree(tiny_llama, tmp_path / "bits=2")
    assert Subject.parse(str(odd)) == Subject(str(odd), odd, None)


def test_numbers_in_tables():
    assert [report.number(value, 2) for value in (None, 3.14159, 1234.5, 2.5e9)] == ["–", "3.14", "1,234", "2.5e+09"]
    assert report.share(0.5, [0.25, 0.75]) == "50.0% (25–75)"


def test_block_details_come_from_the_tensors(low_rank_llava, tiny_llava):
    details = plots.block_details(low_rank_llava)
    assert details.ranks == {"q": [6, 7, 8], "k": [6, 7, 8]}
    # q: 64 x 64, k: 32 x 64 (2 of 4 heads), v: 32 x 64, o: 64 x 64, gate, up, down: 96 x 64 each, in float32
    dense, original = 32 * 64 + 64 * 64 + 3 * 96 * 64, 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64
    assert details.bits == pytest.approx([32 * (dense + rank * (128 + 96)) / original for rank in (6, 7, 8)])
    assert details.density == {"image": [0.1] * 3, "text": pytest.approx([0.2, 0.3, 0.4])}
    assert details.influence == pytest.approx([0.1, 0.2, 0.3])
    plain = plots.block_details(tiny_llava)
    assert (plain.bits, plain.ranks, plain.density, plain.influence) == ([32.0] * 3, {}, {}, [])


def test_fine_tuning_curves(low_rank_llava, tmp_path):
    folder = shutil.copytree(low_rank_llava, tmp_path / "tuned")
    file = folder / "casp_report.json"
    written = json.loads(file.read_text())
    assert plots.fine_tuning([{"model": "m", "method": "a"}], [plots.block_details(folder)]) is None
    for index, block in enumerate(written["blocks"]):
        curves = [[0.4, 0.2], [0.5 * 2**index, 0.2, 0.3]]  # a curve counts at its best
        block["tuning"] = [{"after": ["q"], "curve": [{"training": None, "validation": v} for v in c]} for c in curves]
    written["end_to_end"] = [{"training": None, "validation": 0.9}, {"training": 0.8, "validation": 0.7}]
    file.write_text(json.dumps(written))
    details = plots.block_details(folder)
    assert details.tuned == pytest.approx([0.8, 0.9, 0.95])
    figure = plots.fine_tuning([{"model": "m", "method": "a"}], [details])
    blocks, epochs = figure.axes
    assert [list(line.get_ydata()) for line in blocks.lines] == [details.tuned]
    assert list(epochs.lines[1].get_ydata()) == [0.9, 0.7]


def test_plots_that_no_longer_apply_are_removed(tiny_llava, low_rank_llava, arguments, tmp_path):
    run([tiny_llava, low_rank_llava], arguments)
    run([tiny_llava], arguments)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["quality_vs_bpw.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere/model"], "/nowhere/model does not exist"),
        (["--text", "nothing"], "unknown text 'nothing'"),
        (["--questions-file", "nothing"], "unknown questions 'nothing'"),
        (["--split", "train"], "invalid choice: 'train'"),
        (["--questions", "-1"], "-1 is not at least 0"),
    ],
)
def test_bad_input(refused, tiny_llava, arguments, tmp_path, words, message):
    assert message in refused(main, tiny_llava, *arguments, *words)
    assert not (tmp_path / "out/report.json").exists()


def test_what_others_quantized_is_refused_before_anything_is_measured(refused, tiny_llama, arguments, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(main, tiny_llama, folder, *arguments)
    assert "is stored in the format of gptq" in message
    assert "give the CASP checkpoint" in message
    assert not (tmp_path / "out").exists()
    if not importlib.util.find_spec("gptqmodel"):
        words = ["--model", folder, "--dataset", arguments[3], "--device", "cpu"]
        assert "needs a package that is not installed" in refused(perplexity.main, *words)


def test_a_folder_that_cannot_be_written(refused, tiny_llava, arguments, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(main, tiny_llava, *arguments, "--output", tmp_path / "file" / "out")


def test_script(run_script, tiny_llama, arguments):
    done = run_script("compare.sh", tiny_llama, *arguments, "--split", "validation", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "| tiny-llama | fp32 | 32.00 |" in done.stdout
    assert os.path.exists(f"{arguments[1]}/report.md")
