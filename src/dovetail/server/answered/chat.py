"""The answer of POST /v1/chat/completions, streamed or whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.engine.grammar import Grammar
from dovetail.engine.stream import Token
from dovetail.server.answered.calls import ForcedCalls
from dovetail.server.answered.choice import Choice, Piece
from dovetail.server.answered.chunks import ChunkWriter
from dovetail.server.answered.events import event
from dovetail.server.answered.logprobs import for_chat, for_prompt
from dovetail.server.asked.chat import ChatRequest
from dovetail.server.asked.sampling import to_params
from dovetail.server.asked.tools import call_grammar
from dovetail.server.errors import ApiError
from dovetail.server.served import Delta, Parser, Prompt, Served
from dovetail.server.work import Job, Work
from dovetail.text.chat.template import RESERVED


def chat_job(served: Served, asked: ChatRequest, seed: int) -> Job:
    """Render and tokenise the conversation, and say how to answer it; takes long, so it runs in a thread.

    Raises ApiError for what the template or the model refuses.
    """
    served.check_model(asked.model)
    choice = asked.tool_choice if asked.tool_choice is not None and asked.tool_choice.is_forced else None
    prompt = _render(served, asked)
    grammar = asked.grammar()
    if choice is not None:
        named = [tool for tool in asked.offered if choice.name in (None, tool.function.name)]
        grammar = Grammar(kind="lark", text=call_grammar(named, choice.name, is_parallel=asked.parallel_tool_calls))
    if grammar is not None and prompt.after:
        grammar = grammar.model_copy(update={"after": prompt.after})
    room = served.engine.max_model_len - len(prompt.tokens)
    most = asked.most_tokens()
    shows_tokens = asked.token_details or asked.routed_experts
    top = asked.top_logprobs or 0
    params = to_params(
        asked,
        served.defaults,
        seed,
        max_tokens=max(room, 1) if most is None else most,
        logprobs=top if asked.logprobs or shows_tokens else None,
        grammar=grammar,
    )
    return Job(
        prompt=prompt.tokens,
        params=params,
        parsers=[_parser(prompt, asked) for _ in params],
        priority=asked.priority,
        names_calls=choice is None or choice.name is None,
        keeps_tokens=asked.logprobs or shows_tokens or asked.return_token_ids,
    )


def _parser(prompt: Prompt, asked: ChatRequest) -> Parser:
    choice = asked.tool_choice
    if choice is not None and choice.is_forced:
        return ForcedCalls(prompt.new_parser(reads_calls=False), choice.name)
    return prompt.new_parser(reads_calls=bool(asked.offered))


def _render(served: Served, asked: ChatRequest) -> Prompt:
    options = {
        "tools": [tool.to_template() for tool in asked.offered] or None,
        "add_generation_prompt": asked.add_generation_prompt and not asked.continue_final_message,
        "continue_final_message": asked.continue_final_message,
    }
    if taken := sorted({"messages", *options} & asked.chat_template_kwargs.keys()):
        message = f"chat_template_kwargs: {taken[0]} is a field of its own; give it there"
        raise ApiError(400, message, param="chat_template_kwargs")
    if taken := sorted({"self", *RESERVED} & asked.chat_template_kwargs.keys()):
        message = f"chat_template_kwargs: {taken[0]} cannot be set; leave it out"
        raise ApiError(400, message, param="chat_template_kwargs")
    try:
        messages = [message.to_template() for message in asked.messages]
        for each in messages:
            served.check_length(str(each.get("content") or ""), "messages")
        return served.template.prompt(messages, {**asked.chat_template_kwargs, **options})
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None


class ChatAnswer(ChunkWriter):
    """Writes chunks, or the whole."""

    def __init__(self, served: Served, asked: ChatRequest, seed: int) -> None:
        super().__init__(served, asked, "chatcmpl", "chat.completion.chunk")
        self.asked = asked
        self.jobs = [chat_job(served, asked, seed)]
        self.begun = set[int]()

    def piece(self, work: Work, index: int, piece: Piece) -> bytes:
        """Return the chunks of one step of one choice."""
        chunks = []
        if index not in self.begun:
            self.begun.add(index)
            chunks.append(self.chunk(work, self._choice(index, {"role": "assistant", "content": ""})))
            if self.asked.return_token_ids:
                chunks[0]["prompt_token_ids"] = list(self.jobs[0].prompt)
        written = [delta for delta in map(self._delta, piece.deltas) if delta]
        of_tokens = self._of_tokens(piece.tokens)
        if not written and (of_tokens or piece.finish_reason is not None):
            written.append({})
        choices = [self._choice(index, delta) for delta in written]
        if choices:
            choices[0].update(of_tokens)
            choices[-1].update({"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason})
        return b"".join(event(chunk) for chunk in [*chunks, *(self.chunk(work, choice) for choice in choices)])

    def whole(self, work: Work) -> dict[str, Any]:
        """Return the answer as one object."""
        answer = {
            **self.common("chat.completion"),
            "choices": [self._whole_choice(i, choice) for i, choice in enumerate(work.choices)],
            "usage": work.usage(),
        }
        if self.asked.return_token_ids:
            answer["prompt_token_ids"] = list(self.jobs[0].prompt)
        if self.asked.prompt_logprobs is not None:
            rows = work.streams[0].prompt_logprobs or ()
            answer["prompt_logprobs"] = for_prompt(self.jobs[0].prompt, rows, self.names, self.asked.prompt_logprobs)
        return answer

    def _choice(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _delta(self, delta: Delta) -> dict[str, Any]:
        if delta.call is not None:
            function = {"arguments": delta.arguments}
            if not delta.id:
                return {"tool_calls": [{"index": delta.call, "function": function}]}
            function = {"name": delta.name, **function}
            return {"tool_calls": [{"index": delta.call, "id": delta.id, "type": "function", "function": function}]}
        if delta.reasoning:
            return {"reasoning_content": delta.reasoning} if self.asked.include_reasoning else {}
        return {"content": delta.content}

    def _of_tokens(self, tokens: Sequence[Token]) -> dict[str, Any]:
        found = self.of_tokens(tokens)
        if tokens and self.asked.logprobs:
            found["logprobs"] = for_chat(tokens, self.names, self.asked.top_logprobs or 0)
        return found

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(choice.content), "refusal": None}
        if choice.reasoning and self.asked.include_reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in choice.calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": None,
            **self._of_tokens(choice.tokens),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
