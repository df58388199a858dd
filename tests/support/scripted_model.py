"""`model.py` of the adapter's server tests: the real adapter over the scripted engine."""

from charonia.triton.backend import TritonBackend
from charonia.triton.contract import complete_config
from support.fake_engine import FakeEngine


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        return complete_config(auto_complete_model_config)

    def initialize(self, args):
        self._backend = TritonBackend.start(args, connect=FakeEngine.attach, default_model=lambda: "default")

    def execute(self, requests):
        self._backend.execute(requests)

    def is_ready(self):
        return self._backend.is_ready

    def finalize(self):
        self._backend.shutdown()
