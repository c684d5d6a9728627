"""The towers as an evaluation runs them, compiled for a TPU that is not there.

TOPOLOGY ARCHITECTURE DATA FSDP TENSOR; the test starts it, since a process that has seen one
platform's devices compiles for no other. Prints what a tower exchanges and holds, as JSON.
"""

import json
import math
import sys

import jax
import jax.numpy as jnp

from clip_jax import sharding
from clip_jax.evals.evaluator import image_encoder, text_encoder
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP
from clip_jax.pods import compile as pod
from clip_jax.pods.exchanges import collectives
from clip_jax.pods.topology import Topology

ROWS = 1_024  # of a batch, over all devices


def main(topology: str, architecture: str, *sizes: str) -> None:
    data, fsdp, tensor = map(int, sizes)
    config = sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    mesh = sharding.make_mesh(config, pod._devices(Topology.parse(topology)))
    model = CLIP(zoo.get(architecture))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    places = sharding.param_shardings(model.config, shapes, mesh)
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
    rows, size = sharding.batch_sharding(mesh), model.config.vision.image_size
    length = model.config.text.context_length
    towers = {
        "image": (image_encoder(model, mesh, True), (ROWS, size, size, 3), jnp.uint8),
        "text": (text_encoder(model, mesh), (ROWS, length), jnp.int32),
    }
    found = {"parameters": held(shapes, places)}
    for name, (encode, shape, dtype) in towers.items():
        inputs = jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        compiled = encode.lower(params, inputs).compile()
        found[name] = {
            "exchanges": [
                [x.kind, list(x.axes), [list(shape.dims) for shape in x.shapes], x.source]
                for x in collectives(compiled.as_text(), mesh.shape)
            ],
            "peak": pod.peak(compiled),
        }
    print(json.dumps(found))


def held(shapes, places) -> int:
    """Bytes of one device."""
    return sum(
        math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
        for x, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
