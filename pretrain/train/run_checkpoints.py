"""Checkpoints of a run.

Where to continue, what goes in, the fence around the folder, and what is kept.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from model.errors import UserError
from model.hf.tokenizer.table import tokenizer_file, tokenizer_files
from model.records import Record
from parallel.checkpoint.background import Saved, Saver
from parallel.checkpoint.folders import findings, newest_in, read_pointer, resolve, step_folder, steps_in
from parallel.checkpoint.loader import load
from parallel.checkpoint.reader import CheckpointReader
from parallel.checkpoint.writer import prune
from parallel.engine.engine import Engine
from parallel.exchange import gather_records, together, told_as_it_is
from parallel.hardware.fp8_state import checkpoint_file, restore
from pretrain.config.schema import RunConfig
from pretrain.data.blend import Blend
from pretrain.rundir.environment import versions
from pretrain.rundir.metrics import newest_checkpoint
from pretrain.rundir.state import Owner, StaleStartError, check_owner
from pretrain.train.build import seed_everything
from pretrain.train.same_run import (
    check_same_data,
    check_same_model,
    check_steps,
    differences,
    identity_of,
)

told_as_it_is(StaleStartError)


class Origin(Record):
    """Where a run continues from."""

    own: bool = False
    """Whether it has checkpoints of its own."""
    folder: str | None = None
    """The step folder; None where there is none."""


class Checkpoints:
    """The checkpoints of one run, on every process."""

    folder: Path
    """Where they are."""
    pruning: bool
    """Whether old ones are removed when the next save is done."""

    def __init__(self, config: RunConfig, run_dir: Path, engine: Engine, data: Blend) -> None:
        self.config, self.run_dir, self.engine, self.data = config, run_dir, engine, data
        self.folder, self.pruning = run_dir / "checkpoints", True
        self.saver = Saver(
            self.folder,
            fence=lambda: check_owner(self.run_dir),
            tag=Owner.from_environment().tag,
            after=self._after,
        )

    def move(self, run_dir: Path) -> None:
        """Saves into another run folder from now on: the same one, at another place."""
        self.run_dir, self.folder = run_dir, run_dir / "checkpoints"
        self.saver.folder = self.folder

    def continue_run(self) -> tuple[CheckpointReader, bool] | None:
        """Loads the newest checkpoint of the run, or `checkpoint.load` where the run has none.

        Process 0 says what killed processes left.

        Returns it, and whether it is the run's own.
        Raises UserError for a damaged checkpoint or one of another model.
        """
        with together():
            origin = self._origin() if dist.get_rank() == 0 else Origin()
        origin = gather_records(origin)[0]
        own, source = origin.own, origin.folder
        found = findings(self.folder)
        if source is None:
            self._say(found, "starting from the beginning")
            return None
        if own and self.config.checkpoint.load:
            found.append("checkpoint.load is not used, as the run has checkpoints of its own")
        with going_back(self.folder if own else None):
            with together():
                reader = CheckpointReader(Path(source))
            self._say(found, f"continuing from {reader.folder.name if own else reader.folder}")
        with together():
            changed = check_same_data(reader, self.config, self.data) if own else ""
            check_same_model(reader, self.config)
            if own:
                check_steps(reader, self.config)
        if own:
            self._compare(reader, changed)
        with going_back(self.folder if own else None):
            whole = load(self.engine, reader)
        if not whole:
            # Streams of another layout cannot be cut anew.
            # These are as good, and the same for every start from this checkpoint.
            train = self.config.train
            seed = fresh_seed(train.seed, reader.step)
            seed_everything(seed, self.engine.topology, graph=train.cuda_graph)
        with together():
            restore(self.engine.chunks, reader.folder)
        return reader, own

    def _origin(self) -> Origin:
        newest = newest_in(self.folder)
        if newest is not None:
            return Origin(own=True, folder=str(newest))
        check_nothing_lost(self.run_dir)
        load_from = self.config.checkpoint.load
        return Origin(folder=str(resolve(load_from)) if load_from else None)

    def save(self, step: int, counts: dict[str, object], *, asynchronous: bool) -> Saved | None:
        """Begins a save, or does it all. counts: kept with the position.

        Raises SaveError and StaleStartError as `Saver.save` does.
        """
        train, samples = self.config.train, self.config.batch_sizes.before(step)
        tokenizer = tokenizer_file(self.config.data.corpora[0].path)
        files = tokenizer_files(tokenizer) if dist.get_rank() == 0 and tokenizer.is_file() else {}
        return self.saver.save(
            self.engine,
            step,
            asynchronous=asynchronous,
            progress={
                **counts,
                "consumed_samples": samples,
                "consumed_tokens": samples * self.config.data.seq_length,
                "seed": train.seed,
                "data": [corpus.model_dump() for corpus in identity_of(self.data)],
                **_of_images(self.data),
                **_of_speech(self.data),
            },
            config=self.config.model_dump(mode="json"),
            versions=versions(),
            extra=files | checkpoint_file(self.engine.chunks, self.engine.topology),
        )

    def _after(self) -> None:
        if self.pruning:
            self.prune()

    def prune(self) -> None:
        """Removes old checkpoints, where the run is still this start's. Done by process 0."""
        if dist.get_rank():
            return
        try:
            check_owner(self.run_dir)
        except StaleStartError:
            return
        prune(
            self.folder,
            keep_last=self.config.checkpoint.keep_last,
            keep_every=self.config.checkpoint.keep_every,
        )

    def _compare(self, reader: CheckpointReader, changed: str) -> None:
        """Says in one line what is trained otherwise than before the checkpoint."""
        found = differences(reader, self.config)
        if changed:
            found.append(f"other data from here on ({changed})")
        if found and dist.get_rank() == 0:
            told = f"differs from {reader.folder.name}: {', '.join(found)}"
            print(f"{self.config.name}: {told}", file=sys.stderr, flush=True)

    def _say(self, found: list[str], then: str) -> None:
        if found and dist.get_rank() == 0:
            print(f"{self.config.name}: {', '.join(found)}; {then}", file=sys.stderr, flush=True)


@contextmanager
def going_back(folder: Path | None) -> Iterator[None]:
    """Adds to an error what can be done about a damaged checkpoint of the run itself.

    folder: of its checkpoints, None for another's.
    """
    try:
        yield
    except UserError as error:
        steps = steps_in(folder) if folder is not None else []
        if folder is None or not steps:
            raise
        newest = resolve(folder)
        before = [step_folder(step) for step in steps if step_folder(step) < newest.name]
        after = (
            f"the run goes on from {before[-1]}"
            if before
            else "it is the run's only one, so keep it, and begin again under another name"
        )
        raise UserError(f"{error}. To go back, move {newest} away and start again: {after}") from None


def way_back(folder: Path, known: int) -> str:
    """What can be done after a divergence, as the end of a line.

    folder: of the run's checkpoints.
    known: the last step after which the run went on as it should.
    """
    change = "with a lower optimizer.lr, say"
    steps = steps_in(folder)
    if not steps:
        return f"; no checkpoint is saved: begin again {change}"
    sound = [step_folder(step) for step in steps if step <= known]
    doubtful = [step_folder(step) for step in steps if step > known]
    if not doubtful:
        return f"; start again {change}: the run goes on from {sound[-1]}, after which steps were taken"
    if not sound:
        unknown = f"no step was taken after {doubtful[0]}, which may be broken"
        return f"; {unknown}: start again {change}, and under another name where that ends alike"
    newer = doubtful[0] if len(doubtful) == 1 else f"{doubtful[0]} and what is newer"
    moved = f"move {newer} out of {folder}"
    return (
        f"; {sound[-1]} is the last checkpoint after which steps were taken: {moved} and start again {change}"
    )


def check_nothing_lost(run_dir: Path) -> None:
    """Raises UserError where a run without complete checkpoints had some.

    It would begin again, and replace what is left of them.
    """
    folder = run_dir / "checkpoints"
    saved = newest_checkpoint(run_dir / "metrics.jsonl")
    newest = read_pointer(folder).name or (step_folder(saved) if saved is not None else "")
    if newest:
        raise UserError(
            f"{run_dir} had saved {newest}, but {folder} holds no complete checkpoint: restore it (a folder "
            "that is not mounted?), or begin again under another name, or with the run folder moved away"
        )


def fresh_seed(seed: int, step: int) -> int:
    """Seed of random streams that cannot be the saved ones.

    Other than at the beginning of the run or at any other step.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:4], "big")


def _of_images(data: Blend) -> dict[str, object]:
    """What a model needs to know of images that it was not trained on."""
    facts = data.manifests[0].images
    if facts is None:
        return {}
    return {"images": facts.model_dump(mode="json", include={"classes", "mean", "std"})}


def _of_speech(data: Blend) -> dict[str, object]:
    """What a model needs to know of recordings that it was not trained on."""
    facts = data.manifests[0].speech
    if facts is None:
        return {}
    known = {"filters", "normalise", "mean", "std"}
    return {"speech": facts.model_dump(mode="json", include=known)}
