"""Chats: a conversation as a request, and `generate --chat --interactive` turn by turn."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lit_gpt.errors import UserError
from lit_gpt.generation.completion import Request
from lit_gpt.generation.interactive import Session
from lit_gpt.model import GPT
from lit_gpt.text.chat import ChatTemplate, Message
from lit_gpt.text.tokenizer import Tokenizer


def chat_request(
    request: Request, tokenizer: Tokenizer, messages: list[Message], begun: str = ""
) -> Request:
    """The request for the answer to a conversation.

    Args:
        request: how it is drawn; its stop sequences apply besides the template's.
        tokenizer: the model's, with its template.
        messages: of which the user's is the last.
        begun: the beginning of the answer.

    Raises:
        UserError: messages that the template refuses, or that are not text.
    """
    template = ChatTemplate.of(tokenizer)
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            hint = "check the terminal's encoding"
            if message["role"] == "system":
                raise UserError("is not valid Unicode text", field="system", hint=hint) from error
            raise UserError("the message is not valid Unicode text", hint=hint) from error
    ids = tokenizer.encode_chat(template.render(messages, add_generation_prompt=True) + begun)
    stop = (*request.stop, *template.stop)
    return replace(request, prompt=messages[-1]["content"], ids=tuple(ids.tolist()), stop=stop)


def check_fits(request: Request, model: GPT) -> None:
    """Refuses a conversation that leaves no room for an answer: its beginning would be lost."""
    context = model.config.context_length
    if len(request.ids) >= context:
        raise UserError(
            f"the conversation has {len(request.ids):,} tokens, the model's context {context:,}",
            hint="write a shorter message",
        )


def conversation(system: str | None, prompt: str) -> list[Message]:
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


@dataclass
class ChatSession(Session):
    """A conversation in which each answer sees all turns before it that fit into the context.

    Args:
        system: the system prompt; None: what the template says, if anything.
    """

    system: str | None = None

    greeting = "Type a message; /help lists the commands."
    help = Session.help.replace(
        "text, and the model continues it", "message, and the model answers"
    ) + (
        "\n/new               start a new conversation\n"
        "/system Be brief.  the system prompt, in a new conversation"
    )

    def execute(self, name: str, value: str) -> None:
        if name == "new":
            self.history.clear()
        elif name == "system":
            self.system = value or None
            self.history.clear()
        elif name == "more" and self.history:
            last = self.history.pop()
            try:
                self.answer(*last)
            except UserError:
                self.history.append(last)
                raise
        else:
            super().execute(name, value)

    def answer(self, prompt: str, begun: str = "") -> None:
        """Prints the answer to a message, or what follows its beginning."""
        request = self.fitting(prompt, begun)
        text = self.write(request)
        self.history.append((prompt, begun + text))

    def fitting(self, prompt: str, begun: str) -> Request:
        """The request, without the oldest turns if they leave no room for the answer.

        Raises:
            UserError: the message alone is too long, or it or the system message is not text.
        """
        while True:
            request = chat_request(self.request, self.tokenizer, self.messages(prompt), begun)
            most = self.model.config.context_length - request.max_new_tokens
            if len(request.ids) <= most or not self.history:
                check_fits(request, self.model)
                return request
            del self.history[0]
            print("(The oldest turn no longer fits into the context, and is left out.)")

    def messages(self, prompt: str) -> list[Message]:
        *system, last = conversation(self.system, prompt)
        turns: list[Message] = []
        for earlier, text in self.history:
            turns += [{"role": "user", "content": earlier}, {"role": "assistant", "content": text}]
        return [*system, *turns, last]
