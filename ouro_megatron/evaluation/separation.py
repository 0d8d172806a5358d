"""`ouro analyse pca`: do the hidden states of two sets of prompts drift apart from loop to loop?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ouro_megatron.checkpoint.folder import write_json
from ouro_megatron.errors import DataError, RecipeError
from ouro_megatron.evaluation.prompts import PromptItem, read_items
from ouro_megatron.evaluation.scores import loop_states
from ouro_megatron.evaluation.session import ModelSession

Pool = Literal["last", "mean"]


@dataclass(frozen=True)
class LoopSeparation:
    """One loop. Scores compare the labels with the states of all dimensions, the picture shows two."""

    loop: int
    silhouette: float
    """Mean silhouette of the two sets in the plane of the picture, -1 to 1: above 0 they are apart."""
    accuracy: float
    """Share of prompts whose own set's mean state is the nearer one, each left out of its mean: 0.5 is a coin."""
    explained: tuple[float, float]
    """Shares of the variance that the two axes hold."""
    first: list[tuple[float, float]]
    """Coordinates of the first set's prompts."""
    second: list[tuple[float, float]]


def analyse_separation(
    path: Path,
    first: Path,
    second: Path,
    out: Path,
    *,
    loops: int | None = None,
    pool: Pool = "last",
    limit: int | None = None,
    device: str = "cpu",
) -> list[LoopSeparation]:
    """PCA of each loop's states over both prompt sets; writes `out`/pca.json and pca.png.

    `pool`: the state of a prompt's last token, or the mean over its tokens. Raises DataError for sets that cannot be
    read or have fewer than two prompts.
    """
    sets = [read_items(file, limit) for file in (first, second)]
    for file, items in zip((first, second), sets, strict=True):
        if len(items) < 2:
            raise DataError(f"{file}: at least two prompts are needed, it has {len(items)}")
    session = ModelSession(path, device=device)
    try:
        loops = loops or session.trained_loops
        if loops < 1:
            raise RecipeError(f"--loops {loops}: at least 1")
        states = [prompt_states(session, items, loops, pool) for items in sets]
        found = [separate(loop + 1, states[0][:, loop], states[1][:, loop]) for loop in range(loops)]
        if session.context.rank == 0:
            _write(found, (first, second), session, pool, out)
        return found
    finally:
        session.close()


@torch.inference_mode()
def prompt_states(session: ModelSession, items: Sequence[PromptItem], loops: int, pool: Pool) -> np.ndarray:
    """fp64 [prompts, loops, hidden]."""
    rows = []
    for item in items:
        ids = session.tokenizer.encode(item.text)[-session.max_length :]
        rows.append(
            torch.stack(
                [
                    (h_sbh[-1, 0] if pool == "last" else h_sbh[:, 0].float().mean(0)).double().cpu()
                    for h_sbh in loop_states(session.model.lm, torch.tensor([ids]), loops)
                ]
            )
        )
    return torch.stack(rows).numpy()


def separate(loop: int, first_nh: np.ndarray, second_nh: np.ndarray) -> LoopSeparation:
    """PCA over both sets together, and how far they are apart."""
    both = np.concatenate((first_nh, second_nh))
    labels = np.repeat((0, 1), (len(first_nh), len(second_nh)))
    centred = both - both.mean(0)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    # A sign of their own would flip the picture from loop to loop: the first set's mean lies to the left.
    plane = left[:, :2] * scale[:2]
    if plane.shape[1] < 2:
        plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    plane = plane * np.where(plane[labels == 0].mean(0) > 0, -1.0, 1.0)
    total = float((scale**2).sum()) or 1.0
    shares = [float(value**2) / total for value in scale[:2]] + [0.0, 0.0]
    points = [(float(x), float(y)) for x, y in plane]
    return LoopSeparation(
        loop,
        silhouette(plane, labels),
        nearest_mean_accuracy(both, labels),
        (shares[0], shares[1]),
        points[: len(first_nh)],
        points[len(first_nh) :],
    )


def silhouette(points_nd: np.ndarray, labels_n: np.ndarray) -> float:
    """Mean of (b - a) / max(a, b): a the mean distance to one's own set, b to the other (Rousseeuw 1987)."""
    distance = np.linalg.norm(points_nd[:, None] - points_nd[None], axis=-1)
    values = []
    for index, label in enumerate(labels_n):
        own = labels_n == label
        a = distance[index, own].sum() / max(int(own.sum()) - 1, 1)
        b = distance[index, ~own].mean()
        values.append((b - a) / max(a, b) if max(a, b) > 0 else 0.0)
    return float(np.mean(values))


def nearest_mean_accuracy(states_nh: np.ndarray, labels_n: np.ndarray) -> float:
    """Share of states nearer to the mean of their own set, themselves left out, than to the other's."""
    right = 0
    for index, label in enumerate(labels_n):
        rest = np.arange(len(labels_n)) != index
        means = [states_nh[rest & (labels_n == kind)].mean(0) for kind in (0, 1)]
        nearest = int(np.argmin([np.linalg.norm(states_nh[index] - mean) for mean in means]))
        right += nearest == label
    return right / len(labels_n)


def _write(
    found: Sequence[LoopSeparation], files: tuple[Path, Path], session: ModelSession, pool: Pool, out: Path
) -> None:
    from ouro_megatron.evaluation.figures import separation_figure

    out.mkdir(parents=True, exist_ok=True)
    names = [str(file) for file in files]
    values: dict[str, Any] = {"model": str(session.folder), "first": names[0], "second": names[1], "pool": pool}
    write_json(out / "pca.json", {**values, "loops": [asdict(row) for row in found]})
    separation_figure(
        f"{session.folder}: hidden states by loop", found, (files[0].stem, files[1].stem), out / "pca.png"
    )
