"""The whole demo model, stage by stage: from drawn images to a pipeline, an adapter and a judge."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from ipa.trainer.adapter import train_adapter
from ipa.trainer.demo.clip import train_clip
from ipa.trainer.demo.dataset import Dataset, load_or_draw, write_adapter_data
from ipa.trainer.demo.evaluate import PAIRS, held_out_pairs, score
from ipa.trainer.demo.files import atomic_folder
from ipa.trainer.demo.generate import generate, load_with_adapter
from ipa.trainer.demo.judge import load_judge, save_judge, train_judge
from ipa.trainer.demo.loop import Budget
from ipa.trainer.demo.pipeline import save_pipeline
from ipa.trainer.demo.shapes import IMAGE_SIZE
from ipa.trainer.demo.tokenizer import build_tokenizer
from ipa.trainer.demo.unet import UNetData, embed_captions, load_unet_data, train_unet
from ipa.trainer.demo.vae import encode_all, train_decoder, train_vae
from ipa.trainer.demo.warm_start import warm_start
from ipa.trainer.errors import TrainError
from ipa.trainer.files import atomic_path
from ipa.trainer.options import AdapterOptions

STAGES = ("vae", "clip", "unet", "decoder", "pipeline", "adapter", "judge", "evaluate")
SCALES = (0.0, 0.5, 1.0)  # that the adapter is scored at
MINUTE_SHARES = {"vae": 0.1, "clip": 0.06, "unet": 0.6, "decoder": 0.13, "judge": 0.02}  # the rest is the adapter's


@dataclass(frozen=True)
class DemoConfig:
    """Sizes and lengths. The defaults take hours on two CPU cores.

    Attributes:
        images: drawn training images.
        judge_images: images of the judge, drawn from seeds of its own.
        adapter_pairs: pairs of target and reference for the adapter.
        vae_steps, clip_steps, unet_steps, decoder_steps, adapter_steps, judge_steps: optimizer steps of each stage.
        minutes: end each stage early, schedule and all, after its share of so many minutes. Left out, the steps
            alone decide and a training can be repeated exactly.
        workers: processes that draw and that train the UNet.
        evaluation_pairs: held-out pairs that the result is scored on.
    """

    images: int = 40_000
    judge_images: int = 6_000
    adapter_pairs: int = 10_000
    vae_steps: int = 5_000
    clip_steps: int = 1_250
    unet_steps: int = 20_000
    decoder_steps: int = 5_000
    adapter_steps: int = 4_000
    judge_steps: int = 1_400
    minutes: float | None = None
    workers: int = 2
    evaluation_pairs: int = PAIRS
    seed: int = 0

    def budget(self, stage: str) -> Budget:
        """How long a stage trains."""
        steps = int(getattr(self, f"{stage}_steps"))
        return Budget(steps, None if self.minutes is None else self.minutes * MINUTE_SHARES[stage])


@dataclass(frozen=True)
class DemoFolder:
    """Where everything lies below the output folder."""

    root: Path

    @property
    def work(self) -> Path:
        """Drawn data, checkpoints and finished parts."""
        return self.root / "work"

    @property
    def pipeline(self) -> Path:
        """The diffusers pipeline, with `image_encoder/`."""
        return self.root / "pipeline"

    @property
    def adapter(self) -> Path:
        """The output folder of `ipa-train adapter`."""
        return self.root / "adapter"

    @property
    def judge(self) -> Path:
        """The weights of the shape judge."""
        return self.root / "judge.safetensors"

    @property
    def evaluation(self) -> Path:
        """The scores, by adapter scale."""
        return self.root / "evaluation.json"


def train(output: Path, config: DemoConfig | None = None, stages: Sequence[str] = STAGES) -> DemoFolder:
    """Train the demo model into `output`; a finished stage is kept, an interrupted one goes on.

    Args:
        stages: which of `STAGES` to run; each needs those before it, finished.
    Raises:
        TrainError: a stage is unknown, or one that it needs is not finished.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise TrainError(f"no stage is called {unknown[0]!r}; there are {', '.join(STAGES)}")
    chain = _Chain(DemoFolder(output), config or DemoConfig())
    for stage in STAGES:
        if stage in stages:
            getattr(chain, stage)()
    return chain.folder


class _Chain:
    """The stages; each reads what earlier ones wrote, and writes its own part whole."""

    def __init__(self, folder: DemoFolder, config: DemoConfig) -> None:
        self.folder, self.config = folder, config
        folder.work.mkdir(parents=True, exist_ok=True)

    def vae(self) -> None:
        if not self._part("vae").exists():
            vae = train_vae(self._dataset(), self.config.budget("vae"), self._checkpoint("vae"), self.config.seed)
            with atomic_folder(self._part("vae")) as temporary:
                vae.save_pretrained(temporary)

    def clip(self) -> None:
        if self._part("image_encoder").exists():
            return
        tokenizer = build_tokenizer()
        checkpoint = self._checkpoint("clip")
        text, image = train_clip(self._dataset(), tokenizer, self.config.budget("clip"), checkpoint, self.config.seed)
        for name, part in (("tokenizer", tokenizer), ("text_encoder", text), ("image_encoder", image)):
            with atomic_folder(self._part(name)) as temporary:
                part.save_pretrained(temporary)

    def unet(self) -> None:
        if self._part("unet").exists():
            return
        data = self._unet_data()
        config = self.config
        unet = train_unet(data, config.budget("unet"), self._checkpoint("unet"), config.workers, config.seed)
        with atomic_folder(self._part("unet")) as temporary:
            unet.save_pretrained(temporary)

    def decoder(self) -> None:
        if self._part("vae_decoder").exists():
            return
        latents = load_unet_data(self._unet_data()).latents
        vae = AutoencoderKL.from_pretrained(self._finished("vae"))
        checkpoint = self._checkpoint("decoder")
        train_decoder(vae, self._dataset(), latents, self.config.budget("decoder"), checkpoint, self.config.seed)
        with atomic_folder(self._part("vae_decoder")) as temporary:
            vae.save_pretrained(temporary)

    def pipeline(self) -> None:
        save_pipeline(
            self.folder.pipeline,
            vae=AutoencoderKL.from_pretrained(self._finished("vae_decoder", stage="decoder")),
            text_encoder=CLIPTextModel.from_pretrained(self._finished("text_encoder", stage="clip")),
            tokenizer=CLIPTokenizer.from_pretrained(self._finished("tokenizer", stage="clip")),
            unet=UNet2DConditionModel.from_pretrained(self._finished("unet")),
            image_encoder=CLIPVisionModelWithProjection.from_pretrained(self._finished("image_encoder", stage="clip")),
        )

    def adapter(self) -> None:
        if not self.folder.pipeline.exists():
            raise TrainError(f"{self.folder.pipeline} is not there yet: run the stage 'pipeline' first")
        data = self.folder.work / "adapter-data"
        listing = data / "pairs.jsonl"
        if not listing.exists():
            listing = write_adapter_data(data, self.config.adapter_pairs)
        start = self.folder.work / "adapter-start"
        if not (start / "ip_adapter.safetensors").exists():
            unet = UNet2DConditionModel.from_pretrained(self.folder.pipeline / "unet")
            encoder = CLIPVisionModelWithProjection.from_pretrained(self.folder.pipeline / "image_encoder")
            unet_data = load_unet_data(self._unet_data())
            warm_start(start, self._dataset(), unet_data, unet, encoder, self.config.seed)
        train_adapter(adapter_options(self.folder, listing, self.config.adapter_steps, self.config.seed))

    def judge(self) -> None:
        if self.folder.judge.exists():
            return
        config = self.config
        checkpoint = self._checkpoint("judge")
        judge, _ = train_judge(config.judge_images, config.budget("judge"), checkpoint, config.workers, config.seed)
        save_judge(judge, self.folder.judge)

    def evaluate(self) -> None:
        adapter = self.folder.adapter / "ip_adapter.safetensors"
        for needed, stage in ((adapter, "adapter"), (self.folder.judge, "judge")):
            if not needed.exists():
                raise TrainError(f"{needed} is not there yet: run the stage {stage!r} first")
        pairs = held_out_pairs(self.config.evaluation_pairs)
        loaded, judge = load_with_adapter(self.folder.pipeline, adapter), load_judge(self.folder.judge)
        scores = {str(scale): asdict(score(generate(loaded, pairs, scale), pairs, judge)) for scale in SCALES}
        with atomic_path(self.folder.evaluation) as temporary:
            temporary.write_text(json.dumps(scores, indent=2) + "\n")

    def _dataset(self) -> Dataset:
        return load_or_draw(self.folder.work, self.config.images, self.config.workers)

    def _unet_data(self) -> Path:
        """The file of latents and text states, written on first use."""
        path = self.folder.work / "unet-data.pt"
        if not path.exists():
            vae = AutoencoderKL.from_pretrained(self._finished("vae")).eval().to(memory_format=torch.channels_last)
            text_encoder = CLIPTextModelWithProjection.from_pretrained(self._finished("text_encoder", stage="clip"))
            tokenizer = CLIPTokenizer.from_pretrained(self._finished("tokenizer", stage="clip"))
            dataset = self._dataset()
            states, strides = embed_captions(text_encoder.eval(), tokenizer)
            latents = encode_all(vae, dataset.images)
            with atomic_path(path) as temporary:
                torch.save(vars(UNetData(latents, torch.from_numpy(dataset.attributes), states, strides)), temporary)
        return path

    def _part(self, name: str) -> Path:
        return self.folder.work / name

    def _checkpoint(self, stage: str) -> Path:
        return self.folder.work / f"{stage}.ckpt"

    def _finished(self, name: str, stage: str = "") -> Path:
        """A finished part's folder."""
        part = self._part(name)
        if not part.exists():
            raise TrainError(f"{part} is not there yet: run the stage {stage or name!r} first")
        return part


def adapter_options(folder: DemoFolder, listing: Path, steps: int, seed: int) -> AdapterOptions:
    """How the demo's adapter is trained: `ipa-train adapter` with these options."""
    return AdapterOptions(
        base=str(folder.pipeline),
        image_encoder=str(folder.pipeline / "image_encoder"),
        data=listing,
        image_root=listing.parent,
        output=folder.adapter,
        init_adapter=folder.work / "adapter-start" / "ip_adapter.safetensors",
        steps=steps,
        learning_rate=1e-3,
        batch_size=32,
        resolution=IMAGE_SIZE,
        timestep_bias=1.5,  # the noisiest timesteps decide the colours, the rest keeps them pure
        lr_scheduler="cosine",
        lr_warmup_steps=30,
        max_grad_norm=1.0,
        ema_decay=0.998,
        cache_latents=True,
        seed=seed,
        checkpoint_every=500,
    )
