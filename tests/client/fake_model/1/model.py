"""A Triton model that speaks Charonia's serving contract without an engine: it echoes the words of its prompt.

Each word is one token; a word that is in the list ``stop`` ends the answer. The request's sampling parameters carry,
besides ``max_tokens`` and ``n``, an object ``fake`` that scripts the behaviour: ``delay`` (seconds before each token),
``error`` (a Triton error code), ``error_after`` (tokens sent before the error) and ``message``. The prompt
``?cancelled`` answers the prompts cancelled so far.
"""

import json
import threading
import time
import zlib

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
FINAL_AFTER_CANCEL_S = 0.25
"""Servers of release 24.10 crash when FINAL follows a cancellation at once."""


class TritonPythonModel:
    """Starts one thread per request; `execute` returns at once."""

    def initialize(self, args):
        self._cancelled = []
        self._threads = []

    def execute(self, requests):
        for request in requests:
            thread = threading.Thread(target=self._serve, args=(request, request.get_response_sender()))
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            thread.start()

    def finalize(self):
        for thread in self._threads:
            thread.join()

    def _serve(self, request, sender):
        try:
            self._answer(request, sender)
        except pb_utils.TritonModelException as error:
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), error.code)), FINAL)
        except ScriptedError as error:
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), error.code)), FINAL)

    def _answer(self, request, sender):
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        sampling = json.loads(inputs["sampling_parameters"][0]) if "sampling_parameters" in inputs else {}
        fake = sampling.get("fake", {})
        streaming = bool(inputs.get("stream", [False])[0])
        echo = not streaming and not inputs.get("exclude_input_in_output", [False])[0]
        prompt = self._prompt(inputs)
        scored = prompt.split()
        stop = next((word for word in scored if word in sampling.get("stop", ())), None)
        wanted = scored if stop is None else scored[: scored.index(stop)]
        words = wanted[: sampling.get("max_tokens", 16)]
        reason, cause = ("stop", stop) if len(words) == len(wanted) else ("length", None)
        sent = []
        for index, word in enumerate(words):
            if fake.get("error") and index == fake.get("error_after", 0):
                raise ScriptedError(fake["error"], fake.get("message", "scripted"))
            if self._wait(sender, fake.get("delay", 0.0)):
                self._cancelled.append(prompt)
                time.sleep(FINAL_AFTER_CANCEL_S)
                raise ScriptedError("CANCELLED", "request cancelled")
            sent.append(word if index == 0 else " " + word)
            last = index == len(words) - 1
            if streaming:
                end = (reason, cause) if last else (None, None)
                response = self._response(
                    inputs, sampling, sent[-1:], len(words), end, "", None if index else scored
                )
                sender.send(response, FINAL if last else 0)
        if not streaming:
            echoed = prompt if echo else ""
            response = self._response(inputs, sampling, sent, len(words), (reason, cause), echoed, scored)
            sender.send(response, FINAL)

    def _prompt(self, inputs):
        if "input_ids" in inputs:
            return " ".join(f"<{token}>" for token in inputs["input_ids"])
        if "messages" in inputs:
            body = json.loads(inputs["messages"][0])
            messages = body["messages"] if isinstance(body, dict) else body
            return " ".join(f"{message['role']}: {message['content']}" for message in messages)
        if "text_input" not in inputs:
            raise ScriptedError("INVALID_ARG", "one of text_input, input_ids and messages is required")
        prompt = inputs["text_input"][0].decode()
        return (
            json.dumps(self._cancelled, separators=(",", ":")).replace(" ", "_")
            if prompt == "?cancelled"
            else prompt
        )

    def _wait(self, sender, seconds):
        """Wait, polling for a cancellation; True once the request is cancelled."""
        deadline = time.monotonic() + seconds
        while not sender.is_cancelled():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, 0.01))
        return True

    def _response(self, inputs, sampling, tokens, num_input_tokens, end, echoed, scored):
        """end: finish reason and stop reason. scored: words of the prompt, in the first response only."""
        count = int(sampling.get("n", 1))
        reason, cause = end
        logprobs = positions(tokens) if "logprobs" in sampling else None
        of_prompt = None
        if scored is not None and "prompt_logprobs" in sampling:
            of_prompt = [None, *positions(scored[1:])]
        timings = {"queue_s": 0.001, "first_token_s": 0.01, "total_s": 0.02, "num_cached_tokens": 3}
        wanted = {
            "finish_reason": strings([str(reason)] * count),
            "stop_reason": strings([json.dumps(cause)] * count),
            "cumulative_logprob": np.full(count, -0.5 * len(tokens), np.float32),
            "logprobs": strings([json.dumps(logprobs)] * count),
            "prompt_logprobs": strings([json.dumps(of_prompt)]),
            "num_input_tokens": np.array([num_input_tokens], np.uint32),
            "num_output_tokens": np.full(count, len(tokens), np.uint32),
            "token_ids": np.array([token_id(token) for token in tokens] * count, np.int32),
            "timings": strings([json.dumps(timings)]),
        }
        tensors = [pb_utils.Tensor("text_output", strings([echoed + "".join(tokens)] * count))]
        for name, value in wanted.items():
            if inputs.get("return_" + name, [False])[0]:
                tensors.append(pb_utils.Tensor(name, value))
        return pb_utils.InferenceResponse(tensors)


class ScriptedError(Exception):
    """An error to answer with the given Triton code."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = getattr(pb_utils.TritonError, code)


def strings(values):
    return np.array([value.encode() for value in values], dtype=np.object_)


def token_id(token):
    return zlib.crc32(token.encode()) % 30000


def positions(tokens):
    """Log-probabilities with one alternative a position: the token itself."""
    return [{str(token_id(token)): {"logprob": -0.5, "rank": 1, "decoded_token": token}} for token in tokens]
