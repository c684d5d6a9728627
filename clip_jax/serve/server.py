"""`clip-jax serve`: run the HTTP server from start to shutdown."""

import signal
import socket

from PIL import Image

from clip_jax.display import say
from clip_jax.errors import InputError
from clip_jax.inference.search import load_for
from clip_jax.serve.service import MAX_PIXELS, ServeConfig, Service
from clip_jax.storage.files import AnyPath


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM, after which pending requests are finished, or an interrupt.

    Raises InputError if an extra is missing, the address is taken, or the token file is empty.
    """
    try:
        import uvicorn

        from clip_jax.serve.app import Protocol, build
    except ImportError as error:
        raise InputError("serve needs an extra: pip install 'clip-jax-pods[serve]'") from error
    token = _read_token(config.token_file)
    try:
        taken = socket.create_server((config.host, config.port), backlog=2048)
    except OSError as error:
        raise InputError(
            f"cannot serve at {config.host}:{config.port}: the port is taken or the address is not "
            "this machine's; set other ones by --port and --host."
        ) from error
    # Pillow rejects twice as many: it decodes an icon before its size is known.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    with taken:
        model = load_for(
            config.embeddings,
            config.model,
            tokens=config.tokens,
            dim=config.dim,
            dtype=config.dtype,
        )
        service = Service(config, model)
        service.warm_up()
        settings = uvicorn.Config(
            build(service, token),
            http=Protocol,
            ws="none",
            log_level="error",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=60,
            server_header=False,
        )
        say(f"{config.model} at http://{config.host}:{config.port}")
        # Uvicorn stops on the signal, then raises it again for the previous handler.
        signal.signal(signal.SIGTERM, lambda *_: None)
        uvicorn.Server(settings).run(sockets=[taken])


def _read_token(file: AnyPath | None) -> str | None:
    if file is None:
        return None
    try:
        token = next(iter(file.read_text().splitlines()), "").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"token_file={str(file)!r} cannot be read: {error}.") from error
    if not token:
        raise InputError(f"token_file={str(file)!r} has no token in its first line; write one.")
    return token
