"""The serve command: a server for one checkpoint, until it is stopped."""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
from pathlib import Path

from lit_gpt.checkpoint import load_checkpoint
from lit_gpt.command import call
from lit_gpt.errors import UserError, check_least
from lit_gpt.generation.language_model import find_checkpoint
from lit_gpt.serving.batching import Batcher
from lit_gpt.serving.page import serve_page


def serve(
    ckpt_path: str | None = None,
    logs: str = "logs",
    host: str = "127.0.0.1",
    port: int = 8000,
    max_prompt_tokens: int | None = None,
    max_tokens: int = 2048,
    max_concurrent: int = 64,
    max_batch_size: int = 64,
) -> None:
    """Serve an OpenAI-compatible completions API and a page for trying prompts.

    Args:
        ckpt_path: checkpoint, run's folder, best or last; default: the newest run's best.
        logs: where to look for the newest run.
        host: address to listen on; 0.0.0.0 allows other machines to connect.
        port: 0: any free port.
        max_prompt_tokens: longest prompt; default: the model's context length.
        max_tokens: most tokens that a request may ask for.
        max_concurrent: most requests at a time.
        max_batch_size: most requests computed side by side.

    Raises:
        UserError: no checkpoint, no port, a value out of range, or a package is missing.
    """
    check_least(
        1,
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        max_concurrent=max_concurrent,
        max_batch_size=max_batch_size,
    )
    try:
        from lit_gpt.serving.app import Server, Service, application
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        hint = 'install it with pip install -e ".[serve]"'
        raise UserError(f"serving needs {package}", hint=hint) from error
    with listen(host, port) as listener:
        path = find_checkpoint(ckpt_path, logs)
        model, tokenizer = load_checkpoint(path)
        context = model.config.context_length
        facts = (
            f"{sum(model.num_parameters()):,} parameters, a context of "
            f"{context:,} tokens, a vocabulary of {tokenizer.vocab_size:,} ({tokenizer.name})"
        )
        name = model_name(path)
        batcher = Batcher(model, tokenizer, max_concurrent, max_batch_size)
        service = Service(
            batcher,
            name,
            int(path.expanduser().stat().st_mtime),
            serve_page(name, facts, max_tokens, tokenizer.vocab_size),
            max_prompt_tokens or context,
            max_tokens,
        )
        url, hosts = address(listener, host)
        if hosts is None:
            print(f"Warning: other machines can use this server (host {host})", file=sys.stderr)
        line = f"Serving {path} at {url} (Ctrl-C stops)"
        batcher.start()
        try:
            Server(application(service, hosts), batcher, line).run(sockets=[listener])
        finally:
            batcher.stop()
            batcher.join()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at this address.

    Raises:
        UserError: the address can't be used.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = re.sub(r"^\[.*?\] | \(while .*", "", str(error))
        problem = f"cannot listen on {host}, port {port} ({reason})"
        hint = "choose another `port` (0: any free one) or `host`"
        raise UserError(problem, hint=hint) from error


def address(listener: socket.socket, host: str) -> tuple[str, set[str] | None]:
    """The URL to open, and the host names that requests may use; None: any."""
    bound, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    is_local = ipaddress.ip_address(bound).is_loopback
    return url, {"localhost", "127.0.0.1", "::1", host.lower()} if is_local else None


def model_name(path: Path) -> str:
    """The name in requests: version_0/best for logs/version_0/checkpoints/best.ckpt."""
    folder = path.absolute().parent
    name = f"{folder.parent.name}/{path.stem}" if folder.name == "checkpoints" else path.stem
    return name.encode(errors="replace").decode()  # a path may not be valid text


def main(argv: list[str]) -> int:
    call(serve, argv)
    return 0
