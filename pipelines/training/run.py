"""Runs a training recipe: each stage in order; what is finished is used again.

Under torchrun every rank runs this: the first decides and writes models, all of them train.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from manifests import paths, store
from manifests.errors import UserError
from manifests.record import git_commit, read_latest, versions, write_latest
from manifests.work import RECORD, StageDir
from pipelines.training import launch
from pipelines.training.layout import (
    Planned,
    check_inputs,
    compose_stage,
    data_directories,
    export_stage,
    given_model,
    settings_of,
    tokens_per_image,
    trained_stage,
    unfinished_other,
)
from pipelines.training.recipe import ModelConfig, TrainedStage, TrainingRecipe

if TYPE_CHECKING:
    from train.learn.ranks import Ranks

Say = Callable[[str], Any]


def run_training(
    recipe: TrainingRecipe, out: str, *, until: str | None = None, say: Say = lambda line: None
) -> dict[str, str]:
    """Run a recipe's stages up to `until`, or go on with them.

    Args: say: is called with each line of progress, in the first rank.
    Returns: stage -> its finished directory, in run order. Raises: UserError.
    """
    from train.learn.ranks import joined_ranks

    with joined_ranks() as ranks:
        run = _Run(recipe, paths.absolute(out), until, say if ranks.is_first else _silent, ranks)
        if ranks.is_first:
            text = yaml.safe_dump(recipe.as_mapping(), sort_keys=False, allow_unicode=True)
            store.write(run.out, "recipe.yaml", text.encode())
        return {one.name: one.directory for one in run.stages()}


def _silent(line: str) -> None:
    """Say nothing."""


@dataclass(eq=False)
class _Run:
    """A run of a recipe in a folder."""

    recipe: TrainingRecipe
    out: str
    until: str | None
    say: Say
    ranks: Ranks

    def stages(self) -> list[Planned]:
        """Make what is not finished, and return all stages."""
        wanted = self.recipe.stages(self.until)
        self.ranks.from_first(lambda: self._check_inputs(wanted))
        model = self.recipe.model
        found = [] if model.llava else [self._made(lambda: compose_stage(model, self.out), [])]
        before = found or [self.ranks.from_first(lambda: given_model(model))]
        for stage in self.recipe.trained:
            if stage.name in wanted:
                before = [*before, self._trained(stage, before)]
        if "export" in wanted:
            before = [
                *before,
                self._made(lambda: export_stage(self.recipe, self.out, before), before),
            ]
        return [one for one in before if one.name in wanted]

    def _check_inputs(self, wanted: list[str]) -> None:
        for stage in self.recipe.trained:
            if stage.name in wanted:
                check_inputs(stage)

    def _trained(self, stage: TrainedStage, before: list[Planned]) -> Planned:
        return self._made(
            lambda: trained_stage(stage, self.out, before, tokens_per_image(before[0].directory)),
            before,
            stage,
        )

    def _made(
        self,
        plan: Callable[[], Planned],
        before: list[Planned],
        stage: TrainedStage | None = None,
    ) -> Planned:
        """Return a stage, finished now. The first rank says what it is, and writes it."""
        planned = self.ranks.from_first(plan)
        done = self.ranks.from_first(lambda: self._begun(planned, before))
        started = time.monotonic()
        if not done and stage is not None:
            self.say(f"{planned.name}: {paths.name_of(planned.directory)} trains")
            launch.run(self._job(stage, planned, before), self.recipe.launch, self.say)
        elif not done and self.ranks.is_first:
            self._write(planned, before)
        self.ranks.wait()
        if self.ranks.is_first:
            if not done:
                write_record(planned, time.monotonic() - started)
            self._tell(_chain([*before, planned]))
        return planned

    def _tell(self, chain: list[StageDir]) -> None:
        """Write latest.json, unless it names these stages already, and perhaps later ones."""
        if list(read_latest(self.out).values())[: len(chain)] != chain:
            write_latest(self.out, chain, planned=chain)

    def _begun(self, planned: Planned, before: list[Planned]) -> bool:
        """Say in latest.json what is planned, and return whether it is finished already."""
        if planned.is_finished:
            self.say(f"{planned.name}: {paths.name_of(planned.directory)} is finished, used again")
            return True
        self._refuse_mixing(planned)
        write_latest(self.out, _chain(before), planned=_chain([*before, planned]))
        return False

    def _write(self, planned: Planned, before: list[Planned]) -> None:
        """Compose or export a model, unless that was done and only its record is missing."""
        if paths.exists(paths.join(planned.directory, "config.json")):
            return
        if planned.name == "compose":
            compose_model(self.recipe.model, planned.directory, self.say)
        else:
            from pipelines.training.show import exported_text
            from train.models.export import export

            told = export(before[-1].directory, planned.directory, dtype=self.recipe.export.dtype)
            self.say(exported_text(told))

    def _job(self, stage: TrainedStage, planned: Planned, before: list[Planned]) -> launch.Job:
        base, *trained = before
        return launch.Job(
            config=stage.config(tokens_per_image(base.directory)).model_dump(mode="json"),
            model_dir=base.directory,
            data_dirs=data_directories(stage),
            out=planned.directory,
            projector=trained[-1].directory if trained else None,
            subset=None if stage.subset is None else paths.absolute(stage.subset),
        )

    def _refuse_mixing(self, planned: Planned) -> None:
        """Refuse to leave an unfinished run for one of other settings, unless asked to."""
        from train.learn.checkpoint import differences

        other = unfinished_other(self.out, planned)
        if other is None or self.recipe.launch.beside_unfinished:
            return
        now = {name: value for name, value in planned.decides.items() if name in settings_of(other)}
        before = {name: settings_of(other)[name] for name in now}
        changed = differences(before, now) or ["its model or data changed"]
        raise UserError(
            f"{other} was begun with other settings and is not finished: {'; '.join(changed)}.",
            "Going on with these would leave it behind.",
            "Restore them to go on, or train beside it with --set launch.beside_unfinished=true.",
        )


def _chain(planned: list[Planned]) -> list[StageDir]:
    """Return what latest.json names; a model that was given is no stage."""
    return [StageDir(one.name, one.directory) for one in planned if one.name != "model"]


def compose_model(model: ModelConfig, out: str, say: Say) -> None:
    """Compose a tower and a language model. Raises: UserError."""
    from train.models.compose import compose
    from train.models.hub import local_directory

    made = compose(
        local_directory(str(model.vision_tower)),
        local_directory(str(model.language_model)),
        out,
        image_token=model.image_token,
        resize_vocabulary=model.resize_vocabulary,
        seed=model.seed,
        dtype=model.dtype,
        chat_template=_chat_template(model),
    )
    for warning in made.warnings:
        say(f"warning: {warning}")
    say(f"compose: {made.num_image_tokens} tokens an image, each {made.image_token!r}")


def _chat_template(model: ModelConfig) -> str:
    """Return the composed model's template; export writes the one that was trained with."""
    from train.models.compose import load_tokenizer
    from train.models.hub import local_directory
    from train.models.processor_files import BUNNY_TEMPLATE

    if model.chat_template == "bunny":
        return BUNNY_TEMPLATE
    directory = Path(local_directory(str(model.language_model)))
    own: str | None = load_tokenizer(directory).chat_template
    if own is None:
        raise UserError(
            f"{directory} has no chat template of its own.",
            "recipe.model.chat_template is own.",
            "Set it to bunny.",
        )
    return own


def write_record(planned: Planned, seconds: float) -> None:
    """Write a stage's record.json: from now on it is finished."""
    record = {
        "stage": planned.name,
        "fingerprint": planned.mark,
        "config": planned.decides,
        "inputs": planned.inputs,
        "seconds": round(seconds, 3),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    store.write_json(planned.directory, RECORD, record)
