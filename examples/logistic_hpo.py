"""Learns one regularization coefficient a feature for logistic regression.

Cross-validation finds one coefficient by trying. One a feature are too many to try, but they have
derivatives. Three levels:

    left, right   logistic regressions, each trained on one half of the samples; the weights of
                  feature j cost exp(log[j]) / 2 times their square
    penalty       learns `log`, so that either half's model fits the other half

So many coefficients can be overfitted too, to both halves together. A fifth of the samples is kept
apart to say when to stop; then a model is fitted to all samples with the coefficients found. The
baseline sees the same samples: it takes the one coefficient with the best five-fold log loss, and
is fitted to all of them as well.

The default data are made for the question: 600 images of digits, and beside the 64 pixels 256
columns of noise, each a pixel shuffled among the images. One coefficient shrinks both alike.
`--noise 0` leaves the digits as they are; then one coefficient is better than 64. On a9a the two
are alike, and on news20, whose test documents are of later dates, one is better.

    python examples/logistic_hpo.py
    python examples/logistic_hpo.py --data DIR --dataset a9a

DIR holds libsvm_uci/a9a.npz and news20_counts/news20_counts_full.npz, or is one of these folders:
sparse matrices as arrays indices_train, indptr_train, y_train, counts_train (without: ones), and
the same for test. Of news20 the 20000 words of most documents are used, as tf-idf.
"""

import argparse
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.optim import Adam

import mlodeco
from mlodeco.hypergrad import CG

FIRST_SEED = 100
GRID = 10.0 ** np.arange(3, -3.5, -0.5)  # the coefficients that cross-validation tries
WARMUP, INNER = 1000, 30  # steps of left and right before the first turn of penalty, and a turn
PATIENCE = 5  # turns of penalty without a better loss on the samples kept apart
CAPTION = (
    "Test accuracy in % and test log loss of logistic regression, fitted to the same samples with "
    "one regularization coefficient, by cross-validation, and with one for each feature, learned. "
    "gain = each - one."
)
COLUMNS = ("accuracy\none", "\neach", "\ngain", "log loss\none", "\neach", "\ngain")
FILES = {"a9a": "libsvm_uci/a9a.npz", "news20": "news20_counts/news20_counts_full.npz"}
FORMATS = ("{:.1f}", "{:.1f}", "{:+.1f}", "{:.3f}", "{:.3f}", "{:+.3f}")


class Data(NamedTuple):
    """Samples to learn from, by whatever method, and samples to test with."""

    x: Any  # an array, or a sparse matrix
    y: np.ndarray
    x_test: Any
    y_test: np.ndarray


def learned(data: Data, start: float, turns: int, seed: int) -> np.ndarray:
    """The coefficients, one a feature, that the program below finds from `start`."""
    left_half, right_half, apart = split(data, seed)
    features, classes = data.x.shape[1], int(data.y.max()) + 1
    shape = (features, classes if classes > 2 else 1)  # as scikit-learn has it for two classes
    program = mlodeco.Program()
    options = {
        "module": {"w": torch.zeros(shape), "b": torch.zeros(shape[1])},
        "optimizer": partial(Adam, lr=0.1),
        "warmup": WARMUP,
        "inner_steps": INNER,
    }

    @program.level("left", data=[left_half], **options)
    @program.level("right", data=[right_half], **options)
    def train(model, batch, penalty):
        x, y = batch
        cost = (penalty.log.exp() * model.w.square().sum(dim=1)).sum() / 2
        return loss(model, x, y) + cost / len(y)

    # The formula of the hypergradient holds where the levels below are at their solutions. All
    # samples are in one batch, so they come close: on digits to 5 %, the hypergradient to 10 %.
    @program.level(
        "penalty",
        lower=["left", "right"],
        hypergrad=CG(max_steps=30, rtol=1e-2),
        module={"log": torch.full((features,), float(np.log(start)))},
        optimizer=partial(Adam, lr=0.1),
        data=[(left_half, right_half)],
    )
    def check(net, batch, left, right):
        of_left, of_right = batch
        return loss(left, *of_right) + loss(right, *of_left)

    tried: list[tuple[float, np.ndarray]] = []

    @program.on("before_step", level="penalty")
    @torch.no_grad()
    def watch(left, right, penalty, ctx):
        x, y = (part.to(ctx.device) for part in apart)
        held_out = (loss(left, x, y) + loss(right, x, y)).item() / 2
        tried.append((held_out, penalty.log.exp().cpu().numpy()))
        losses = [value for value, _ in tried]
        if len(losses) - 1 - losses.index(min(losses)) >= PATIENCE:
            ctx.stop()

    steps = WARMUP + (turns + 1) * INNER  # the last turn is there to watch the one before
    mlodeco.run(steps, program=program, progress="off")
    return min(tried, key=lambda item: item[0])[1]


def loss(model: nn.ParameterDict, x: Tensor, y: Tensor) -> Tensor:
    logits = x @ model.w + model.b
    if logits.shape[1] == 1:
        logits = F.pad(logits, (1, 0))  # two classes: the logit of the first is 0
    return F.cross_entropy(logits, y)


def split(data: Data, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Two halves of four fifths of the samples, and the other fifth."""
    order = np.random.default_rng(seed).permutation(len(data.y))
    cuts = [round(0.4 * len(order)), round(0.8 * len(order))]
    return [(tensor(data.x[i]), torch.tensor(data.y[i])) for i in np.split(order, cuts)]


def tensor(x: Any) -> "Tensor | Sparse":
    return Sparse(*map(compressed, (x, x.T))) if sp.issparse(x) else torch.tensor(x)


def compressed(x: Any) -> Tensor:
    x = x.tocsr().sorted_indices()
    parts = (torch.tensor(part) for part in (x.indptr, x.indices, x.data))
    with warnings.catch_warnings(action="ignore"):  # "beta state"
        return torch.sparse_csr_tensor(*parts, x.shape, check_invariants=True)


class Sparse(NamedTuple):
    """A constant sparse matrix. With its transpose at hand derivatives are ten times as fast."""

    x: Tensor
    transposed: Tensor

    def __matmul__(self, other: Tensor) -> Tensor:
        return Product.apply(*self, other)

    def to(self, device: torch.device) -> "Sparse":
        return Sparse(self.x.to(device), self.transposed.to(device))


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, transposed, other):
        ctx.swapped = transposed, x
        return x @ other

    @staticmethod
    def backward(ctx, grad):
        return None, None, Product.apply(*ctx.swapped, grad)


def cross_validated(data: Data) -> float:
    """The one coefficient with the best five-fold log loss: from strong to weak, until it rises."""
    best, best_score = GRID[0], -np.inf
    for coefficient in GRID:
        model = LogisticRegression(C=1 / coefficient, max_iter=2000)
        score = cross_val_score(model, data.x, data.y, cv=5, scoring="neg_log_loss").mean()
        if score < best_score:
            break
        best, best_score = coefficient, score
    return float(best)


def fit_and_test(data: Data, coefficients: np.ndarray) -> tuple[float, float]:
    """Test accuracy in % and log loss of a model fitted to all of x and y.

    To divide a feature by the root of its coefficient is to multiply the cost of its weights by
    the coefficient, so an ordinary solver serves for both methods.
    """
    scale = sp.diags_array((coefficients**-0.5).astype(np.float32))
    model = LogisticRegression(C=1, max_iter=2000).fit(data.x @ scale, data.y)
    probabilities = model.predict_proba(data.x_test @ scale).astype(np.float64)
    accuracy = 100 * (probabilities.argmax(axis=1) == data.y_test).mean()
    of_true_class = probabilities[np.arange(len(data.y_test)), data.y_test]
    return float(accuracy), float(-np.log(of_true_class).mean())


def experiment(data: Data, turns: int, seed: int) -> list[float]:
    """One row of the table: accuracies with one coefficient and one each, then log losses."""
    one = cross_validated(data)
    each = learned(data, one, turns, seed)
    tests = fit_and_test(data, np.full(len(each), one)), fit_and_test(data, each)
    return [value for pair in zip(*tests, strict=True) for value in (*pair, pair[1] - pair[0])]


def digits(noise: int, seed: int) -> Data:
    x, y = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    columns = generator.integers(x.shape[1], size=noise)
    x = np.concatenate([x, generator.permuted(x[:, columns], axis=0)], axis=1).astype(np.float32)
    learn, test = np.split(generator.permutation(len(y)), [600])
    scaler = StandardScaler().fit(x[learn])
    return Data(scaler.transform(x[learn]), y[learn], scaler.transform(x[test]), y[test])


def load(folder: Path, dataset: str) -> Data:
    path = folder / FILES[dataset]
    with np.load(path if path.is_file() else folder / path.name) as file:
        arrays = dict(file)
    x, x_test = matrix(arrays, "train"), matrix(arrays, "test")
    if dataset == "news20":
        documents = np.bincount(x.indices, minlength=x.shape[1])
        frequent = np.argsort(-documents, kind="stable")[:20000]
        x, x_test = x[:, frequent], x_test[:, frequent]
        scaler = TfidfTransformer(sublinear_tf=True).fit(x)
    else:
        x, x_test = x.toarray(), x_test.toarray()
        scaler = StandardScaler().fit(x)
    classes, y = np.unique(arrays["y_train"], return_inverse=True)  # from 0 on
    y_test = np.searchsorted(classes, arrays["y_test"])
    return Data(scaler.transform(x), y, scaler.transform(x_test), y_test)


def matrix(arrays: dict[str, np.ndarray], part: str) -> sp.csr_array:
    index, rows = arrays[f"indices_{part}"].astype(np.int32), arrays[f"indptr_{part}"]
    values = arrays.get(f"counts_{part}", np.ones(len(index))).astype(np.float32)
    width = 1 + max(int(arrays[f"indices_{part}"].max()) for part in ("train", "test"))
    return sp.csr_array((values, index, rows), shape=(len(rows) - 1, width))


def show(rows: dict[int, list[float]], title: str) -> None:
    table = Table(title=title, caption=CAPTION, title_justify="left", caption_justify="left")
    for column in ("seed", *COLUMNS):
        table.add_column(column, justify="right", min_width=8)
    for seed, row in rows.items():
        table.add_row(str(seed), *map(str.format, FORMATS, row))
    if len(rows) > 1:
        values = np.array(list(rows.values()))
        error = values.std(axis=0, ddof=1) / len(rows) ** 0.5
        table.add_section()
        table.add_row("mean", *map(str.format, FORMATS, values.mean(axis=0)))
        table.add_row("std. error", *(f"{value:.2g}" for value in error))
    Console(width=100, highlight=False).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("digits", *FILES), default="digits")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where a9a or news20 is")
    parser.add_argument("--noise", type=int, help="columns, for digits (default: 256)")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 5; with --data 1)")
    parser.add_argument("--turns", type=int, default=40, help="of penalty, at most (default: 40)")
    given = parser.parse_args()
    seeds = given.seeds if given.seeds is not None else 1 if given.data else 5
    noise = 256 if given.noise is None else given.noise
    if seeds < 1 or given.turns < 1 or noise < 0:
        parser.error("--seeds and --turns must be at least 1, --noise at least 0")
    if (given.dataset == "digits") != (given.data is None):
        parser.error("--data DIR and --dataset a9a or --dataset news20 go together")
    if given.data and given.noise is not None:
        parser.error("--noise is for digits, and goes with no --data")
    if given.data and given.data.is_file():
        parser.error(f"--data {given.data}: {given.data} is not a folder")
    try:
        data = load(given.data, given.dataset) if given.data else None
    except FileNotFoundError:
        parser.error(f"no {FILES[given.dataset]} in {given.data}")
    except (OSError, ValueError, KeyError, BadZipFile):
        parser.error(f"{FILES[given.dataset]} in {given.data} does not hold the arrays expected")
    torch.set_num_threads(1)  # the rest is for other programs
    rows = {}
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        rows[seed] = row = experiment(data or digits(noise, seed), given.turns, seed)
        print(f"seed {seed}: accuracy {row[0]:.1f} with one, {row[1]:.1f} with each", flush=True)
    show(rows, given.dataset if data else f"digits with {noise} columns of noise")


if __name__ == "__main__":
    main()
