"""speed.sh on tiny layers: the rows, the table, bad arguments."""

import json

import pytest
import torch
from casp_eval import generation_speed, speed


def test_rows_and_table(run_module, tmp_path):
    words = ["--shapes", "256x264", "320x256", "--batches", "1", "80", "--bits", "1", "3", "--repeats", "2"]
    done = run_module("casp_eval.speed", "--output", tmp_path / "new", *words, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "new/speed.json").read_text())
    assert result["device"]
    assert result["threads"] >= 1
    assert result["implementation"].startswith(("cpu-", "reference"))
    rows = {(row["codebook"], row["what"], row["bits"], row["shape"], row["batch"]): row for row in result["rows"]}
    kinds = [
        (codebook, what, bits) for codebook in ("e8p", "trellis") for what in ("kernel", "layer") for bits in (1, 3)
    ]
    assert set(rows) == {
        (*kind, shape, batch)
        for kind in (*kinds, ("none", "layer", 3))
        for shape in ("256x264", "320x256")
        for batch in (1, 80)
    }
    for row in rows.values():
        assert row["backend"] == ("gptq" if row["codebook"] == "none" else "quip-sharp")
        assert row["device"] == "cpu"
        assert row["speedup_vs_dense"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        assert 0 < row["dense_float32_least_seconds"] <= row["dense_float32_seconds"]
        assert 0 < row["least_seconds"] <= row["seconds"]
        assert 0 < row["dense_least_seconds"] <= row["dense_seconds"]
    table = done.stdout.splitlines()
    assert len(table) == 2 + len(rows)
    assert table[1].split()[:8] == ["backend", "codebook", "what", "bits", "shape", "batch", "seconds", "dense"]
    assert all(len(line.split()) == 14 for line in table[2:])


def test_generation_measures_every_kind_of_linear_and_leaves_the_head():
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "vocab_size": 50}
    rows = generation_speed.measure_generation(8, torch.device("cpu"), shape, rounds=1)
    assert [(row["codebook"], row["bits"]) for row in rows] == [("dense", 16), *generation_speed.QUANTIZED]
    assert rows[0]["speedup_vs_dense"] == 1
    model = generation_speed.random_llama(shape, torch.device("cpu"))
    assert len(generation_speed.linears_of(model)) == 7
    generation_speed.put(model, {"layers.0.self_attn.q_proj": torch.nn.Identity()})
    assert isinstance(model.model.layers[0].self_attn.q_proj, torch.nn.Identity)


def test_weights_of_a_round_exceed_the_last_cache(monkeypatch):
    cpu = torch.device("cpu")
    assert speed.last_cache_bytes(cpu) >= 2**16
    made = []
    original = speed.contenders

    def counted(*arguments):
        found, size = original(*arguments)
        made.append(size)
        return found, size

    monkeypatch.setattr(speed, "contenders", counted)
    monkeypatch.setattr(speed, "last_cache_bytes", lambda device: 2**16)
    speed.measure(["e8p"], [2], 64, 64, 1, cpu, 1)
    assert sum(made) >= 2 * 2**16 > sum(made[1:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "4096"], "4096 is not OUTxIN"),
        (["--shapes", "0x8"], "0x8 is not OUTxIN"),
        (["--bits", "5"], "invalid choice: 5"),
        (["--ggml", "tests"], "--ggml tests holds no libggml-base.so and libggml-cpu.so; build"),
        (["--batches", "0"], "0 is not at least 1"),
        (["--device", "tpu"], "--device tpu is unknown"),
    ],
)
def test_bad_arguments_end_in_one_sentence(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.setattr("sys.argv", ["speed", "--output", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit) as ended:
        speed.run_main(speed.main)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_made(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["speed", "--output", str(tmp_path / "file/out"), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        speed.run_main(speed.main)
    assert ended.value.code == 2
    assert "choose another --output" in capsys.readouterr().err
