"""Recipes: what is refused at load, what an override means, and that the packaged ones parse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from manifests.errors import UserError
from pipelines.recipe import load, parse
from pipelines.stages import STAGES

RECIPES = Path(__file__).resolve().parent.parent / "pipelines" / "recipes"
TARS: dict[str, Any] = {"source": {"kind": "webdataset", "path": "data"}}
EMBEDDINGS: dict[str, Any] = {"source": {"kind": "clip_retrieval", "path": "data"}}
TALKS: dict[str, Any] = {"source": {"kind": "llava_json", "files": {"svit": "svit.json"}}}
OF_PAIRS: dict[str, dict[str, Any]] = {
    "filter": {},
    "embed": {"model": "m"},
    "cluster": {"num_clusters": 5},
    "dedup": {},
    "select": {},
    "assemble": {},
}
OF_TALKS: dict[str, dict[str, Any]] = {
    "clean": {},
    "resolve": {"roots": {"coco": "data/coco"}},
    "mix": {},
}


def written(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


BASE = "source: {kind: webdataset, path: data}\nfilter: {min_side: 10}\n"


CURATION = sorted(path for path in RECIPES.glob("*.yaml") if not path.name.startswith("train_"))


@pytest.mark.parametrize("path", CURATION, ids=lambda path: path.name)
def test_a_packaged_recipe_parses_says_how_it_is_run_and_survives_being_saved(path: Path) -> None:
    recipe = load(str(path))
    saved = yaml.safe_dump(recipe.as_mapping())
    assert parse(yaml.safe_load(saved)) == recipe
    header = path.read_text().split("\nseed", 1)[0]
    assert "command" in header
    assert "hardware" in header
    assert load(f"warren:recipes/{path.name}") == recipe


def test_a_stage_that_a_recipe_does_not_name_is_skipped_and_ingest_always_runs() -> None:
    recipe = parse(TARS | {"filter": None})
    assert [stage.name for stage in recipe.stages()] == ["ingest", "filter"]
    assert [stage.name for stage in parse(TARS).stages("ingest")] == ["ingest"]
    with pytest.raises(UserError, match="no stage 'embed'"):
        recipe.stages("embed")


def test_instruction_rows_are_cleaned_resolved_and_mixed() -> None:
    names = ["ingest", *OF_TALKS]
    assert [stage.name for stage in parse(TALKS | OF_TALKS).stages()] == names
    for last in range(1, len(names)):
        sections = {name: OF_TALKS[name] for name in names[1:last]}
        assert list(parse(TALKS | sections).configs) == names[:last]


def test_the_stages_run_in_the_order_of_the_table_not_of_the_file() -> None:
    recipe = parse({"cluster": {"num_clusters": 2}, "filter": {}, **EMBEDDINGS})
    assert list(recipe.configs) == [name for name in STAGES if name in recipe.configs]


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("filter.min_side=64", ("filter", "min_side"), 64),
        ("filter.max_aspect_ratio=3", ("filter", "max_aspect_ratio"), 3.0),
        ("filter.drop_nsfw_tags=[NSFW, UNSURE]", ("filter", "drop_nsfw_tags"), ["NSFW", "UNSURE"]),
        ("filter.max_caption_chars=null", ("filter", "max_caption_chars"), None),
        ("source.path=a=b", ("source", "path"), "a=b"),
        ("source.name=yes please", ("source", "name"), "yes please"),
        ("seed=7", ("seed",), 7),
    ],
)
def test_an_override_is_yaml_at_a_dotted_place(
    tmp_path: Path, override: str, where: tuple[str, ...], value: Any
) -> None:
    found: Any = load(written(tmp_path, BASE), [override]).as_mapping()
    for step in where:
        found = found[step]
    assert found == value
    assert type(found) is type(value)


def test_an_override_adds_a_section_and_the_last_one_wins(tmp_path: Path) -> None:
    path = written(tmp_path, "source: {kind: webdataset, path: data}")
    recipe = load(path, ["filter.min_side=1", "filter.min_side=2"])
    assert recipe.configs["filter"].canonical()["min_side"] == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("filter.min_side", "is not key=value"),
        ("=5", "is not key=value"),
        ("filter.min_sdie=5", r"recipe\.filter\.min_sdie is unknown(.|\n)*'min_side'"),
        ("filtre.min_side=5", r"recipe\.filtre is unknown(.|\n)*'filter'"),
        ("filter.min_side=[", "has no YAML value"),
        ("filter.min_side=2024-99-99", "has no YAML value"),
        ("filter.min_side=big", r"recipe\.filter\.min_side is 'big'"),
        ("filter.min_side.deep=5", r"recipe\.filter\.min_side is \{'deep': 5\}"),
        ("filter=5", r"recipe\.filter should be a mapping"),
        ("seed=-1", "recipe.seed is -1"),
        ("seed=1.5", "recipe.seed is 1.5"),
        ("seed=true", "recipe.seed is True"),
        ("max_quarantine_fraction=1.1", "max_quarantine_fraction is 1.1"),
        ("max_quarantine_fraction=.nan", "max_quarantine_fraction is nan"),
        ("max_quarantine_fraction=a", "max_quarantine_fraction is 'a'"),
        ("item_timeout_seconds=0", "item_timeout_seconds is 0"),
        ("item_timeout_seconds=soon", "item_timeout_seconds is 'soon'"),
        ("ingest.path=x", r"recipe\.ingest is unknown"),
        ("source.shards_per_part=0", r"recipe\.source\.shards_per_part is 0"),
        ("source.kind=tar", r"recipe\.source\.kind is 'tar'"),
    ],
)
def test_a_wrong_override_is_a_user_error(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(written(tmp_path, BASE), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 0\nseed: 1\n" + BASE, "key 'seed' is written twice"),
        (BASE + "embed: {model: a, model: b}", "key 'model' is written twice"),
        ("", "is not a mapping"),
        ("- a\n- b", "is not a mapping"),
        ("a: [", "is not YAML"),
        ("a: 2024-99-99", "is not YAML"),
        ("a: " + "[" * 5000, "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("? [a]\n: 1", "is not YAML"),
        ("filter: {}", r"recipe\.source is missing"),
        ("source:", r"recipe\.source should be a mapping, not None"),
        ("source: {kind: webdataset}", r"recipe\.source\.path is missing"),
        ("source: {kind: llava_json}", r"recipe\.source\.files is missing(.|\n)*Add files: \.\.\."),
        ("source: {kind: llava_json, files: {}}", r"recipe\.source\.files is \{\}"),
        ("source: {kind: llava_json, files: {a: b}, path: c}", "takes files, not path"),
        ("source: {kind: webdataset, path: c, files: {a: b}}", "takes path, not files"),
        ("source: {kind: webdataset, path: }", r"recipe\.source\.path is missing"),
        ("source: {kind: llava_json, files: {a: ''}}", r"recipe\.source\.files\.a is ''"),
        ("source: {kind: llava_json, files: {a/b: c}}", r"recipe\.source\.files\.a/b"),
        ("source: data", r"recipe\.source should be a mapping"),
        (BASE + "5: {}", r"recipe\.5 is unknown"),
        (BASE + "cluster: {num_clusters: 5}", r"recipe\.cluster needs recipe\.embed"),
    ],
)
def test_a_wrong_file_is_a_user_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(written(tmp_path, text))


def test_a_recipe_that_cannot_be_opened_is_a_user_error(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.yaml", "does not exist"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=message):
            load(str(path))
    (tmp_path / "latin.yaml").write_bytes(b"source: caf\xe9")
    with pytest.raises(UserError, match="is not YAML"):
        load(str(tmp_path / "latin.yaml"))


def test_merge_keys_of_yaml_work(tmp_path: Path) -> None:
    text = "source: &s {kind: webdataset, path: a}\n"
    recipe = load(written(tmp_path, text + "filter: &f {min_side: 5}\n"))
    assert recipe.configs["filter"].canonical()["min_side"] == 5
    merged = load(written(tmp_path, "source: {<<: {kind: webdataset, path: a}, path: b}"))
    assert merged.source.path == "b"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (EMBEDDINGS | {"embed": {"model": "m"}}, r"recipe\.embed needs images"),
        (
            EMBEDDINGS | {"filter": {"drop_below_pixel_std": 3.0}},
            r"drop_below_pixel_std needs images",
        ),
        (EMBEDDINGS | {"dedup": {}}, r"recipe\.dedup needs recipe\.cluster"),
        (TARS | {"cluster": {"num_clusters": 5}}, r"recipe\.cluster needs recipe\.embed"),
        (TARS | {"select": {"clip_band": [0.1, 0.9]}}, r"recipe\.select needs recipe\.embed"),
        (
            EMBEDDINGS | {"select": {"centroid_band": [0, 1]}},
            r"recipe\.select needs recipe\.cluster",
        ),
        *(
            (TALKS | {name: given}, rf"recipe\.{name} needs image-text pairs")
            for name, given in OF_PAIRS.items()
        ),
        *(
            (source | {name: given}, rf"recipe\.{name} needs instruction rows")
            for name, given in OF_TALKS.items()
            for source in (TARS, EMBEDDINGS)
        ),
        (TALKS | {"resolve": OF_TALKS["resolve"]}, r"recipe\.resolve needs recipe\.clean"),
        (TALKS | {"clean": {}, "mix": {}}, r"recipe\.mix needs recipe\.resolve"),
        (TALKS | {"mix": {}}, r"recipe\.mix needs recipe\.clean"),
        (EMBEDDINGS | {"cluster": {}}, "one of num_clusters and centroids must be set"),
        (EMBEDDINGS | {"cluster": {"num_clusters": 0}}, r"recipe\.cluster\.num_clusters is 0"),
        (EMBEDDINGS | {"cluster": {"num_clusters": -4}}, r"recipe\.cluster\.num_clusters is -4"),
        (
            EMBEDDINGS | {"cluster": {"num_clusters": 5, "iterations": 0}},
            r"recipe\.cluster\.iterations is 0",
        ),
    ],
)
def test_sections_that_cannot_go_together_are_refused_before_anything_runs(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse(values)


CLUSTERED = EMBEDDINGS | {"cluster": {"num_clusters": 5}}
BANDS = {"clip_band": [0.4, 0.6], "centroid_band": [0.15, 0.35], "num_samples": 5}


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("dedup", {"similarity_above": 1.5}),
        ("dedup", {"similarity_above": float("nan")}),
        ("dedup", {"keep": "best"}),
        ("select", BANDS | {"clip_band": [0.6, 0.4]}),
        ("select", BANDS | {"clip_band": [-0.1, 0.4]}),
        ("select", BANDS | {"clip_band": [0.1, 1.4]}),
        ("select", BANDS | {"clip_band": [0.1]}),
        ("select", BANDS | {"clip_band": "wide"}),
        ("select", BANDS | {"num_samples": -1}),
    ],
)
def test_absurd_thresholds_are_refused(section: str, values: dict[str, Any]) -> None:
    given = CLUSTERED | {"dedup": {}} | {section: values}
    with pytest.raises(UserError, match=rf"recipe\.{section}"):
        parse(given)
