"""`push`, and the model cards that it and `convert --to hf` write."""

import json

import pytest
from convert_helpers import OFFICIAL
from huggingface_hub import ModelCard

import mae_jax
from mae_jax.convert import __main__ as convert
from mae_jax.convert import push, weights
from mae_jax.convert.model_card import model_card, run_facts
from mae_jax.train.config import Config
from mae_jax.train.config_schema import as_json

FLAGS = ["--num-heads", "2", "--decoder-num-heads", "2"]
SUMMARY = {"knn_top1": 0.7645, "top1": 0.5, "final_loss": 0.4429, "steps": 1000, "eval_seconds": 3}
FIELDS = {"library_name", "pipeline_tag", "tags", "license", "base_model"}  # all known to the hub


@pytest.fixture
def info(golden):
    return weights.read(golden / OFFICIAL, heads=2, decoder_heads=2).info


def facts(init):
    return {"config": as_json(Config()), "summary": SUMMARY | {"init": init}}


def test_the_folder_is_read_back_and_its_card_is_valid(golden, tmp_path, capsys):
    out = tmp_path / "a b"
    push.main([str(golden / OFFICIAL), "me/vit", "--out", str(out), "--license", "mit", *FLAGS])
    assert f"hf upload me/vit '{out}' ." in capsys.readouterr().out
    names = {"README.md", "config.json", "preprocessor_config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    assert mae_jax.load(out)[0].info.width == 32
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data.keys() == FIELDS - {"base_model"}
    assert (data["license"], data["library_name"]) == ("mit", "transformers")
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert 'mae_jax.load("me/vit")' in card.text
    with pytest.raises(weights.ConvertError, match="exists: choose another path"):
        push.main([str(golden / OFFICIAL), "me/vit", "--out", str(out), *FLAGS])


def test_a_card_of_timm_has_no_decoder(golden, tmp_path):
    out = tmp_path / "out"
    push.main([str(golden / OFFICIAL), "me/vit", "--out", str(out), "--to", "timm", *FLAGS])
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    text = (out / "README.md").read_text()
    assert "decoder" not in text
    assert 'timm.create_model("hf-hub:me/vit", pretrained=True)' in text


def test_a_card_says_what_is_known_of_the_run(info):
    init = {"path": "hf://facebook/vit-mae-base@v1", "revision": "1" * 40}
    text = model_card(info, "hf", facts(init), repo="me/vit", license_id="cc-by-nc-4.0")
    data = ModelCard(text).data.to_dict()
    assert data.keys() == FIELDS
    assert data["base_model"] == "facebook/vit-mae-base"
    for line in (
        "| recipe | pretraining |",
        "| length | 1000 steps |",
        "| masking | random, 75% of the patches |",
        "| k-NN, top-1 (split validation) | 76.45% |",
        "| accuracy, top-1 (split validation) | 50.00% |",
        "| last training loss | 0.4429 |",
        "trained from hf://facebook/vit-mae-base@v1, whose license applies, too.",
    ):
        assert line in text
    usage = text.split("```")[1].splitlines()[1:]
    assert len(usage) == 3


def test_a_card_shows_no_private_paths(info):
    known = facts({"path": "/home/me/secret/base.pth"})
    known["config"]["data"] |= {"source": "folder", "path": "/home/me/secret/birds"}
    text = model_card(info, "timm", known)
    assert "| data | birds, split train |" in text
    assert "| started from | base.pth |" in text
    assert "secret" not in text
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "license" not in ModelCard(text).data.to_dict()


def test_facts_come_from_the_workdir(tmp_path, golden):
    run = tmp_path / "run"
    (run / "checkpoints" / "5").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"task": "pretrain"}))
    (run / "summary.json").write_text("[]")
    expected = {"config": {"task": "pretrain"}, "summary": {}}
    for path in (run, run / "checkpoints", run / "checkpoints" / "5"):
        assert run_facts(path) == expected
    assert run_facts(golden / OFFICIAL) == {}


def test_convert_writes_a_card(golden, tmp_path):
    convert.main([str(golden / OFFICIAL), str(tmp_path / "vit"), "--to", "hf", *FLAGS])
    card = ModelCard.load(tmp_path / "vit" / "README.md")
    assert card.data.library_name == "transformers"
    assert "# vit\n" in card.text


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/name@v1", "hf://org/name", "runs/x.pth"])
def test_bad_names(golden, name):
    with pytest.raises(SystemExit) as exit_:
        push.main([str(golden / OFFICIAL), name])
    assert exit_.value.code == 2
