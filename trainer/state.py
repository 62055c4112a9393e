"""The part of a training run that a checkpoint holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ipa.trainer.checkpoints import newest_checkpoint, save_checkpoint, set_aside
from ipa.trainer.data import Record
from ipa.trainer.ema import MovingAverage
from ipa.trainer.errors import TrainError
from ipa.trainer.model import AdapterModel
from ipa.trainer.options import AdapterOptions
from ipa.trainer.weights import StateDict, cpu_copies

# Options that do not change what a step computes: a resumed run may set them anew.
FREE_OPTIONS = {"base", "image_encoder", "data", "image_root", "output", "init_adapter", "num_workers"}
FREE_OPTIONS |= {"checkpoint_every", "keep_checkpoints", "resume", "log_every"}


@dataclass
class TrainState:
    """Weights, optimizer and step count. Random numbers need no state, see ``ipa.trainer.draws``.

    Attributes:
        accelerator: of this process.
        model: with the weights being trained.
        optimizer: as prepared by the accelerator.
        average: the weights' moving average, None when off.
        identity: what must not change between a run and its continuation.
        root: folder of the checkpoints.
        step: optimizer steps done.
        saved_step: the step of the newest checkpoint on the disk.
    """

    accelerator: Any
    model: AdapterModel
    optimizer: Any
    average: MovingAverage | None
    identity: dict[str, Any]
    root: Path
    step: int = 0
    saved_step: int = 0

    def save(self, keep: int) -> None:
        """Write a checkpoint of this step, by the main process; a step is written once.

        Raises:
            TrainError: the disk is full or failed.
        """
        if self.accelerator.is_main_process and self.step != self.saved_step:
            save_checkpoint(self.root, self.step, self._write, keep)
        self.saved_step = self.step
        self.accelerator.wait_for_everyone()

    def resume(self, report: Callable[[str], None]) -> None:
        """Go on from the newest undamaged checkpoint, if there is one; all processes take the same.

        Raises:
            TrainError: the checkpoint belongs to a run with other options or data.
        """
        found = [newest_checkpoint(self.root, report) if self.accelerator.is_main_process else None]
        broadcast_object_list(found)
        if found[0] is None:
            return
        step, folder = found[0]
        self._check_identity(json.loads((folder / "state.json").read_text(encoding="utf-8"))["identity"], folder)
        self.model.load_adapter_state_dict(load_file(folder / "adapter.safetensors"), str(folder))
        if self.average is not None:
            self.average.load(load_file(folder / "average.safetensors"))
        progress = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(progress["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        self.step = self.saved_step = step
        report(f"resuming after step {step} from {folder}")

    def weights(self) -> StateDict:
        """The weights to write: the average where there is one."""
        return self.model.named_weights() if self.average is None else self.average.weights

    def start_afresh(self, report: Callable[[str], None]) -> None:
        """Move the checkpoints of an earlier run out of the way."""
        if self.accelerator.is_main_process and (aside := set_aside(self.root)) is not None:
            report(f"the checkpoints of an earlier run are now in {aside}")
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path) -> None:
        scaler = self.accelerator.scaler
        progress = {"optimizer": self.optimizer.state_dict(), "scaler": None if scaler is None else scaler.state_dict()}
        try:
            save_file(cpu_copies(self.model.named_weights()), folder / "adapter.safetensors")
            if self.average is not None:
                save_file(cpu_copies(self.average.weights), folder / "average.safetensors")
            torch.save(progress, folder / "optimizer.pt")
        except (RuntimeError, SafetensorError) as error:  # how these two libraries report a full disk
            raise OSError("a file could not be written to its end, the disk may be full") from error
        record = {"step": self.step, "identity": self.identity}
        (folder / "state.json").write_text(json.dumps(record, indent=2), encoding="utf-8")

    def _check_identity(self, saved: dict[str, Any], folder: Path) -> None:
        for name, value in self.identity.items():
            if saved.get(name) != value:
                raise TrainError(
                    f"{folder} was trained with {name.replace('_', ' ')} {saved.get(name)}, this run has {value}; "
                    "set it back to go on, or give --no-resume or another --output to start afresh"
                )


def run_identity(options: AdapterOptions, records: list[Record], processes: int) -> dict[str, Any]:
    """Everything that a resumed run must share with the run before, for the loss curve to be the same.

    Args:
        options: of the run; ``steps`` counts only where the learning rate depends on it.
        records: of the data set, in order.
        processes: how many train together.
    """
    identity = {name: value for name, value in asdict(options).items() if name not in FREE_OPTIONS}
    if options.lr_scheduler == "constant":
        del identity["steps"]
    digest = hashlib.sha256()
    for record in records:
        paths = (path.relative_to(options.image_root).as_posix() for path in (record.image, record.reference))
        digest.update(json.dumps([*paths, record.text]).encode())
    return {**identity, "processes": processes, "data_sha256": digest.hexdigest()}
