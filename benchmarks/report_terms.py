"""What the words of a report mean; each is said once, if the report uses it."""

from __future__ import annotations

from collections.abc import Sequence

from ipa.benchmarks.report_parts import Section, Term

_ALWAYS = [
    Term(
        "Interval",
        "A figure is followed by its 95 % bootstrap interval, as in 1.50 (1.46 to 1.55): its measurements are "
        "drawn again 10,000 times, and 95 % of what that gives lies in it. It covers what varied within the run, not "
        "a change of machine or version.",
    ),
]
_SPEED = [
    Term(
        "Step",
        "One step of the denoising loop of a whole call, guidance and scheduler included. A call makes as many "
        "images as the setting says, so a step of a call of 4 images does the work of 4.",
    ),
    Term(
        "Times as fast",
        "The median of ratios, each of one round in which blocks of both were timed in turn (A B B A), so that a drift "
        "of the machine meets both. Above 1 is faster than the baseline. If the interval covers 1, this run "
        "could tell no difference; that is not a proof that there is none.",
    ),
    Term(
        "Null",
        "The baseline measured against itself in the same way. It must cover 1; if it does not, something else "
        "moved the figures and no ratio of the run should be believed.",
    ),
    Term(
        "Floor",
        "The time that a step's operations take at the matrix product rate that was measured on this machine, or "
        "its bytes at the measured memory bandwidth, whichever is longer. Step over floor can be below 1 where an "
        "engine needs fewer operations than are counted, such as with Winograd convolutions.",
    ),
    Term(
        "Settled",
        "Warm-up runs blocks of steps until two in a row agree within 2 %; it is bounded, and not settled means "
        "that the bound came first.",
    ),
    Term(
        "Stages",
        "Medians of what runs once for each call, beside the loop. Seconds per image and images per second are of "
        "whole calls: all steps and all stages, divided by the images of a call.",
    ),
    Term(
        "First call, load, build",
        "First call: the first block of the loop and the first run of each stage, with all that is put off until "
        "then. Load: from the start of the process until it could be called. Build: of engines that are built "
        "before and kept.",
    ),
    Term(
        "Peak memory",
        "On the host the largest resident set of the contender's process. On the device the largest of three readings, "
        "after warm-up, rounds and stages, less what was in use before the process started.",
    ),
]
_QUALITY = [
    Term("CLIP-I", "Cosine of the CLIP embeddings of a picture and of its image prompt; the mean over pictures."),
    Term(
        "CLIP-T",
        "Cosine of the CLIP embeddings of a picture and of its text; the mean over pictures. CLIPScore "
        "(arXiv:2104.08718) is 2.5 times the cosine, torchmetrics gives 100 times; both count a negative cosine as "
        "0, which the raw mean here does not.",
    ),
    Term("DINO", "Cosine of DINO's embeddings of a picture and of its image prompt; the mean over pictures."),
    Term(
        "FID",
        "Fréchet distance of the pictures' Inception features to the data's; lower is closer. It depends on the "
        "number of pictures and on how they were resized, so compare it only where both are equal.",
    ),
    Term(
        "PSNR",
        "Peak signal-to-noise ratio between two arms' pictures of the same seed, in decibels; higher is closer, "
        "equal pictures count as 100 dB.",
    ),
    Term("LPIPS", "Perceptual distance between two arms' pictures of the same seed; lower is closer."),
]


def terms(sections: Sequence[Section]) -> list[Term]:
    """The terms of these sections."""
    shown = list(_ALWAYS)
    shown += _SPEED if any(section.kind == "speed" for section in sections) else []
    quality = [section for section in sections if section.kind == "quality"]
    words = " ".join(column for section in quality for table in section.tables for column in table.columns)
    return shown + [term for term in _QUALITY if term.name in words]
