"""The least that can stream: a constant word, again and again, from two threads. What is left is Triton's own cost."""

import queue
import threading

import numpy as np
import triton_python_backend_utils as pb_utils

TOKENS = 256
SENDERS = 2


class TritonPythonModel:
    """Sends `TOKENS` responses to every request, whatever it asks for."""

    def initialize(self, args):
        """Start the senders."""
        self._inboxes = [queue.SimpleQueue() for _ in range(SENDERS)]
        self._next = 0
        self._word = np.empty(1, dtype=np.object_)
        self._word[0] = b" word"
        for inbox in self._inboxes:
            threading.Thread(target=self._send, args=(inbox,), daemon=True).start()

    def execute(self, requests):
        """Hand the requests to the senders in turn."""
        for request in requests:
            self._inboxes[self._next % SENDERS].put(request.get_response_sender())
            self._next += 1

    def _send(self, inbox):
        live = {}
        while True:
            while not live or not inbox.empty():
                live[inbox.get()] = 0
            for sender in list(live):
                live[sender] += 1
                last = live[sender] == TOKENS
                flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
                tensor = pb_utils.Tensor("text_output", self._word)
                sender.send(pb_utils.InferenceResponse(output_tensors=[tensor]), flags=flags)
                if last:
                    del live[sender]
