"""Owns the serve command: options in, a server on a port until it is stopped."""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
from argparse import Namespace
from pathlib import Path

from lit_gpt.checkpoint import find_newest, load_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.serving.batching import Batcher
from lit_gpt.serving.page import serve_page


def serve(options: Namespace) -> None:
    """Serves a checkpoint until Ctrl-C or SIGTERM; options of serve.py.

    Raises:
        UserError: no checkpoint, no port, or a package is missing.
    """
    try:
        from lit_gpt.serving import app
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        raise UserError(
            f'{package} is missing, which serving needs: pip install -e ".[serve]"'
        ) from error
    with listen(options.host, options.port) as listener:
        path = Path(options.ckpt_path or find_newest(options.logs))
        model, tokenizer = load_checkpoint(path)
        context = model.config.context_length
        facts = (
            f"{sum(model.num_parameters()):,} parameters, a context of "
            f"{context:,} tokens, a vocabulary of {tokenizer.vocab_size:,} ({tokenizer.name})"
        )
        name = name_of(path)
        batcher = Batcher(model, tokenizer, options.max_concurrent, options.max_batch_size)
        service = app.Service(
            batcher,
            name,
            int(path.expanduser().stat().st_mtime),
            serve_page(name, facts, options.max_tokens, tokenizer.vocab_size),
            options.max_prompt_tokens or context,
            options.max_tokens,
        )
        url, hosts = reach(listener, options.host)
        app, line = app.application(service, hosts), f"Serving {path} at {url} (Ctrl-C stops)"
        batcher.start()
        try:
            app.Server(app, batcher, line).run(sockets=[listener])
        finally:
            batcher.stop()
            batcher.join()


def listen(host: str, port: int) -> socket.socket:
    """Raises:
    UserError: it can't be listened there.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = re.sub(r"^\[.*?\] | \(while .*", "", str(error))
        raise UserError(
            f"cannot listen at {host}, port {port} ({reason}): give another --port (0: any that "
            "is free), or --host"
        ) from error


def reach(listener: socket.socket, host: str) -> tuple[str, set[str] | None]:
    """The address to open, and the names that the server goes by; None: any."""
    bound, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if ipaddress.ip_address(bound).is_loopback:
        return url, {"localhost", "127.0.0.1", "::1", host.lower()}
    print(f"Warning: --host {host} lets other machines use this server", file=sys.stderr)
    return url, None


def name_of(path: Path) -> str:
    """What requests call the model: version_0/best for logs/version_0/checkpoints/best.ckpt."""
    folder = path.absolute().parent
    name = f"{folder.parent.name}/{path.stem}" if folder.name == "checkpoints" else path.stem
    return name.encode(errors="replace").decode()  # a path need not be text
