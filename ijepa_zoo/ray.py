"""Operators of Ray Data: decode images in CPU tasks, compute features in actors.

    dataset = read_images("s3://bucket/photos")
    map_features(dataset, "vit_huge14_ijepa", num_gpus=1, actors=8).write_parquet("s3://bucket/out")

Batches are Arrow tables, so that other columns keep their types: as NumPy arrays, integers with
nulls would become floats. Pixels and features are those of :func:`ijepa_zoo.extract_features`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .data.decode import Decoder
from .data.files import IMAGE_SUFFIXES, SHARD_SUFFIXES
from .data.transforms import ModelTransform, create_transform
from .encode import Encoder, class_names
from .errors import DataError, ImageError, MissingPackageError, RunError, SettingsError
from .features import Layers
from .models.factory import create_model
from .predictions import Predictions

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

Model = str | Callable[[], nn.Module]

_DECODED = 64  # images in one piece
_PROCESS_BYTES = 1 << 30  # of an actor without the weights
_SUFFIXES = sorted(suffix[1:] for suffix in IMAGE_SUFFIXES)


def decode_images(
    batch: pa.Table,
    transform: ModelTransform,
    decoder: Decoder | None = None,
    column: str | None = None,
) -> pa.Table:
    """Decode and transform image files; `pixels` uint8 `[C, H, W]` and `error` replace them.

    `column` has the bytes of image files, or structs of `bytes` and `path` as on the Hugging Face
    Hub. Default: the first that is not null of `bytes`, `image`, and columns named like an image
    suffix (`jpg`, `png`), as WebDataset samples have them. `transform` is that of
    `create_transform(model, normalize=False)`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    names = [column] if column else ["bytes", "image", *_SUFFIXES]
    found = [name for name in batch.column_names if (name if column else name.lower()) in names]
    if not found:
        raise DataError(f"no column of images ({column or 'bytes, image, jpg, ...'}) among "
                        f"{', '.join(batch.column_names)}: name it with column")  # fmt: skip
    files = [batch.column(name) for name in found]
    rest = batch.drop_columns(found)
    if pa.types.is_struct(files[0].type):
        if "path" not in rest.column_names:
            rest = rest.append_column("path", pc.struct_field(files[0], "path"))
        files = [pc.struct_field(files[0], "bytes")]
    pixels = np.zeros((len(batch), *transform.input_size), np.uint8)
    errors: list[str | None] = [None] * len(batch)
    for row, content in enumerate(pc.coalesce(*files).to_pylist()):
        try:
            if content is None:
                raise ImageError("no image in this row")
            pixels[row] = transform(decoder(content) if decoder else content).numpy()
        except ImageError as error:
            errors[row] = str(error)
    kind = pa.fixed_shape_tensor(pa.uint8(), transform.input_size)
    flat, size = pa.array(pixels.reshape(-1)), math.prod(transform.input_size)
    tensors = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(flat, size))
    rest = rest.append_column("pixels", tensors)
    return rest.append_column("error", pa.array(errors, pa.string()))


class FeatureActor:
    """Turns decoded images into features, or into class probabilities if the model is a classifier.

    `model` is a name for :func:`ijepa_zoo.create_model`, or a function that creates the model; the
    options are those of :func:`ijepa_zoo.extract_features`, without maps. `threads` are by default
    torch's, which are the CPUs that Ray assigns to the actor.
    """

    def __init__(
        self,
        model: Model,
        *,
        layers: Layers = "last",
        pool: str | None = "auto",
        dtype: str = "float32",
        precision: str = "auto",
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        network = _open_model(model)
        is_classifier = class_names(network) is not None
        self.column = "probabilities" if is_classifier else "features"
        self.encoder = Encoder(
            network, layers=layers, pool=pool, dtype=dtype, precision=precision, device=device,
            threads=threads or torch.get_num_threads(),
            extractor=Predictions(network) if is_classifier else None,
        )  # fmt: skip
        is_dense = getattr(network, "is_dense", False)
        if is_dense or len(self.encoder.row_shape) != 1 or dtype == "bfloat16":
            raise SettingsError(
                "a row of Parquet holds one vector of float32 or float16: give a pool other than "
                f"None, a model without a dense head, and a dtype other than {dtype!r}"
            )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Replace `pixels` by `features` or `probabilities`, a list `[D]`; null after an error."""
        import pyarrow as pa

        errors, size = batch["error"].to_pylist(), self.encoder.batch_size
        images = torch.tensor(batch["pixels"].combine_chunks().to_numpy_ndarray())
        pieces = [(images[i : i + size], errors[i : i + size]) for i in range(0, len(images), size)]
        good = np.array([error is None for error in errors], bool)
        values = np.zeros((len(images), *self.encoder.row_shape), self.encoder.settings["dtype"])
        if pieces:
            found = [rows for rows, _ in self.encoder.encode(pieces)]
            values[good] = torch.cat(found).cpu().numpy()
        if not np.isfinite(values).all():
            raise RunError(
                "features are NaN or infinite: use float32 for dtype and precision; if that fails "
                "too, the weights are damaged"
            )
        flat = pa.array(values.reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(~good))
        return batch.drop_columns(["pixels"]).append_column(self.column, column)


def read_images(paths: str | Sequence[str], filesystem: Any = None) -> Dataset:
    """Read image files, Parquet files or WebDataset shards, without decoding images.

    `paths` are files or folders of one kind, local or URIs such as s3:// and gs://. The suffix of
    the first tells Parquet files and tar shards from images and folders of images, which give the
    columns `bytes` and `path`.
    """
    data = _ray_data()
    paths = [paths] if isinstance(paths, str) else list(paths)
    suffix = paths[0].lower()
    if suffix.endswith(".parquet"):
        return data.read_parquet(paths, filesystem=filesystem)
    if suffix.endswith(SHARD_SUFFIXES):
        types = [suffix[1:] for suffix in SHARD_SUFFIXES]
        return data.read_webdataset(
            paths, filesystem=filesystem, decoder=None, file_extensions=types
        )
    return data.read_binary_files(
        paths, filesystem=filesystem, include_paths=True, file_extensions=_SUFFIXES
    )


def map_features(
    dataset: Dataset,
    model: Model,
    *,
    column: str | None = None,
    decoder: Decoder | None = None,
    actors: int | tuple[int, int] = 1,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> Dataset:
    """Add decoding and features to a dataset of image files.

    Args:
        dataset: Of :func:`read_images`, or any with a column of image files.
        model: See :class:`FeatureActor`. It is also created here once, for its transform.
        column: See :func:`decode_images`.
        decoder: Sets ranges of values, bands or the largest size. Default: that of the model.
        actors: Copies of the model; the least and the most for a pool that grows and shrinks.
        num_cpus: CPUs that each actor reserves, by default 1, as the tasks that decode.
        num_gpus: GPUs that each actor reserves.
        batch_size: Images per call of an actor. Default: 256 with GPUs, else 32.
        options: Arguments of :class:`FeatureActor`.
    """
    least, most = (actors, actors) if isinstance(actors, int) else actors
    pool = _ray_data().ActorPoolStrategy(min_size=least, max_size=most)
    network = _open_model(model)
    transform = create_transform(network, normalize=False)
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    decoded = dataset.map_batches(
        _decode_block,
        batch_size=None,  # with a size, Ray would read and decode in separate tasks
        batch_format="pyarrow",
        fn_kwargs={"transform": transform, "decoder": decoder, "column": column},
    )
    return decoded.map_batches(
        FeatureActor,
        batch_size=batch_size or (256 if num_gpus else 32),
        batch_format="pyarrow",
        compute=pool,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        memory=_PROCESS_BYTES + weights,  # reserving some also keeps Ray from decoding in the actor
        fn_constructor_args=(model,),
        fn_constructor_kwargs=options,
    )


def _decode_block(batch: pa.Table, **options: Any) -> Iterator[pa.Table]:
    """Decode in pieces: thousands of small files may become gigabytes of pixels."""
    for row in range(0, max(1, len(batch)), _DECODED):  # an empty batch has columns, too
        yield decode_images(batch.slice(row, _DECODED), **options)


def _open_model(model: Model) -> nn.Module:
    network: nn.Module = create_model(model) if isinstance(model, str) else model()
    return network.eval()


def _ray_data() -> Any:
    try:
        import ray.data
    except ImportError as error:
        raise MissingPackageError(
            "features on Ray need Ray Data: pip install 'ray[data]'"
        ) from error
    return ray.data
