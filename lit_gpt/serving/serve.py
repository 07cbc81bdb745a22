"""The serve command: a server for one checkpoint, until it is stopped."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
from pathlib import Path

from jsonargparse.typing import SecretStr

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
    api_key: SecretStr | None = None,
    allow_anyone: bool = False,
    max_prompt_tokens: int | None = None,
    max_tokens: int = 2048,
    max_concurrent: int = 64,
    max_batch_size: int = 64,
) -> None:
    """Serve OpenAI-compatible completions and chats, and a page for trying prompts.

    Args:
        ckpt_path: checkpoint, run's folder, best or last; default: the newest run's best.
        logs: where to look for the newest run.
        host: address to listen on; 0.0.0.0 allows other machines to connect.
        port: 0: any free port.
        api_key: what clients must send to use the model; default: LIT_GPT_API_KEY, which, unlike
            this option, no other user of the machine can see.
        allow_anyone: listen to other machines without a key.
        max_prompt_tokens: longest prompt; default: the model's context length.
        max_tokens: most tokens that a request may ask for.
        max_concurrent: most requests at a time.
        max_batch_size: most requests computed side by side.

    Raises:
        UserError: no checkpoint, no port, no key where one is needed, a value out of range, or a
            package is missing.
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
    key = find_key(api_key)
    with listen(host, port) as listener:
        url, hosts = address(listener, host)
        if hosts is None and key is None:
            check_is_meant(host, allow_anyone)
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
            serve_page(name, facts, max_tokens, tokenizer.vocab_size, needs_key=key is not None),
            max_prompt_tokens or context,
            max_tokens,
            context,
        )
        line = f"Serving {path} at {url} (Ctrl-C stops)"
        batcher.start()
        try:
            Server(application(service, hosts, key), batcher, line).run(sockets=[listener])
        finally:
            batcher.stop()
            batcher.join()


def find_key(given: SecretStr | None) -> str | None:
    """The key, or else that of the environment; None: there is none.

    Raises:
        UserError: it can't be sent.
    """
    if given is None and not os.environ.get("LIT_GPT_API_KEY"):
        return None
    key = os.environ["LIT_GPT_API_KEY"] if given is None else given.get_secret_value()
    if not re.fullmatch("[!-~]+", key):
        hint = "python -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        raise UserError("must be ASCII without spaces", field="api_key", hint=hint)
    return key


def check_is_meant(host: str, allow_anyone: bool) -> None:
    """Refuses to let other machines use the server without a key, unless that is meant."""
    if not allow_anyone:
        problem = "lets everyone who can reach this machine use the model"
        hint = "give `api_key` or set LIT_GPT_API_KEY; if that is intended, add `allow_anyone`"
        raise UserError(problem, field="host", value=host, hint=hint)
    print(f"Warning: anyone can use this server (host {host}, no key)", file=sys.stderr)


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
