"""What the words of a report mean; each is said once, if the report uses it."""

from __future__ import annotations

from collections.abc import Sequence

from ipa.benchmarks.report_parts import Section, Term

_UNIT = "Image prompts"
_ALWAYS = [
    Term(
        "Interval",
        "A figure is followed by its 95 % interval, as in 1.50 (1.46 to 1.55). Where its own entry here says nothing "
        "else it is a bootstrap interval: the measurements are drawn again 10,000 times, and 95 % of what that gives "
        "lies in it. It covers what varied within the run, not a change of machine or version.",
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
    Term(
        _UNIT,
        "Pictures of one image prompt are alike, so intervals of quality draw image prompts again, not pictures; "
        "where one image prompt was drawn there is no interval.",
    ),
    Term(
        "Paired differences",
        "One arm's figure minus another's of the same image prompt and seeds; the mean, with the interval of "
        "these differences. Arms share their image prompts, so whether their own intervals overlap says little: most "
        "of what those span is how image prompts differ. If the interval covers 0, this run could tell no difference; "
        "that is not a proof that there is none.",
    ),
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
        "number of pictures and on how they were resized, so compare it only where both are equal. Its interval is "
        "the figure and 2.26 standard errors to each side (Student's t, 9 degrees of freedom), the error from 10 draws "
        "of the image prompts. Percentiles of such draws would be too high: fewer distinct pictures raise FID itself.",
    ),
    Term(
        "PSNR",
        "Peak signal-to-noise ratio between two arms' pictures of the same seed, in decibels; higher is closer. That "
        "of equal pictures is infinite: they are counted apart, and the median is of the others (of each image prompt "
        "its samples' median, then over image prompts).",
    ),
    Term("LPIPS", "Perceptual distance between two arms' pictures of the same seed; lower is closer."),
    Term(
        "Rates",
        "Of the demo's pictures alone. The text names a shape; the image prompt shows another shape, in the colours "
        "and the texture that are wanted. Shape: the share of pictures whose shape is the text's. Texture, foreground "
        "and background colour: the share whose texture or colour is the image prompt's. Colours are read off the "
        "pixels; shape and texture are what the judge sees, a small network that was trained apart from the model. "
        "Where all pictures are hits, or none is, the interval has no width although more pictures might differ.",
    ),
]


def terms(sections: Sequence[Section]) -> list[Term]:
    """The terms of these sections."""
    shown = list(_ALWAYS)
    shown += _SPEED if any(section.kind == "speed" for section in sections) else []
    quality = [section for section in sections if section.kind == "quality"]
    tables = [table for section in quality for table in section.tables]
    words = " ".join(text for table in tables for text in (table.title, *table.columns))
    return shown + [term for term in _QUALITY if term.name in words or (quality and term.name == _UNIT)]
