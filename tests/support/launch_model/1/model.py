"""A model that idles, for tests of what starts and supervises servers. Texts that make it do something:

`sleep S` answers after so many seconds; `hold` never lets go of the interpreter. In the folder beside this file,
`broken` makes it fail to load with the file's text, and `engine` gives it an engine process of a kind.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
FAKE_ENGINE = """
import json, os, sys, time
path, generation, owner = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
while os.path.exists(f"/proc/{owner}"):
    state = "failed" if os.path.exists(path + ".fail") else "ready"
    status = dict(pid=os.getpid(), state=state, generation=generation, beat=time.monotonic(), restarts=generation - 1)
    with open(path + ".new", "w") as file:
        json.dump(status, file)
    os.rename(path + ".new", path)
    time.sleep(0.2)
"""


class TritonPythonModel:
    def initialize(self, args):
        here = Path(args["model_repository"]) / args["model_version"]
        if (here / "broken").exists():
            raise ValueError((here / "broken").read_text())
        self.engine = None
        if (here / "engine").exists():
            parameters = json.loads(args["model_config"])["parameters"]
            self.path = Path(parameters["runtime_dir"]["string_value"]) / "engine.json"
            self.closed = threading.Event()
            self.keeper = threading.Thread(target=self.keep_engine)
            self.keeper.start()

    def keep_engine(self):
        generation = 0
        while not self.closed.is_set():
            generation += 1
            command = [sys.executable, "-c", FAKE_ENGINE, str(self.path), str(generation), str(os.getppid())]
            self.engine = subprocess.Popen(command, start_new_session=True)
            while self.engine.poll() is None and not self.closed.wait(0.1):
                pass
            self.closed.wait(1.0)

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.answer, args=(request, request.get_response_sender())).start()

    def answer(self, request, sender):
        text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()[0].decode()
        if text.startswith("sleep"):
            time.sleep(float(text.split()[1]))
        if text == "hold":
            re.match(r"(a+)+$", "a" * 40 + "b")  # exponential, and sre never releases the lock
        stream = pb_utils.get_input_tensor_by_name(request, "stream")
        words = text.split() if stream is not None and stream.as_numpy()[0] else [text]
        for index, word in enumerate(words):
            tensor = pb_utils.Tensor("text_output", np.array([word.encode()], dtype=object))
            sender.send(pb_utils.InferenceResponse([tensor]), FINAL if index == len(words) - 1 else 0)

    def finalize(self):
        if self.engine is not None:
            self.closed.set()
            self.keeper.join()
            self.engine.kill()
            self.engine.wait()
