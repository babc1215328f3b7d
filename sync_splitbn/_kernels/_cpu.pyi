# Tensors are addresses; a type is a letter of cpu.LETTERS; a batch is what cpu._batch returns.

Batch = tuple[int | tuple[int, ...], int, int, int, int, bool, int]

def moments(type: str, batch: Batch, x: int, packed: int) -> None: ...
def normalize(
    type: str,
    batch: Batch,
    x: int,
    y: int,
    mean: int,
    var: int,
    weights: tuple[int, ...] | None,
    biases: tuple[int, ...] | None,
    eps: float,
) -> None: ...
def grad_sums(type: str, batch: Batch, dy: int, x: int, mean: int, sums: int) -> None: ...
def grad_input(
    type: str,
    batch: Batch,
    dy: int,
    x: int,
    dx: int,
    mean: int,
    var: int,
    packed: int,
    sums: int,
    weights: tuple[int, ...] | None,
    eps: float,
) -> None: ...
def alone(
    type: str,
    batch: Batch,
    x: int,
    y: int,
    packed: int,
    mean: int,
    var: int,
    weights: tuple[int, ...] | None,
    biases: tuple[int, ...] | None,
    eps: float,
) -> None: ...
def grad_alone(
    type: str,
    batch: Batch,
    dy: int,
    x: int,
    dx: int,
    mean: int,
    var: int,
    packed: int,
    grads: int,
    weights: tuple[int, ...] | None,
    eps: float,
) -> None: ...
def follow(
    type: str,
    features: int,
    packed: int,
    mean: int,
    var: int,
    means: tuple[int, ...],
    vars: tuple[int, ...],
    trackers: tuple[int, ...],
    momentum: float,
) -> None: ...
