"""TensorRT-RTX's interface, where it is another: a runtime configuration with a cache of kernels.

Its "kernels" are lines with the shapes of a run; it says on stderr when it compiles one.
"""

import sys

import tensorrt
from tensorrt import ILogger as ILogger

__version__ = tensorrt.__version__


class CudaGraphStrategy:
    WHOLE_GRAPH_CAPTURE = 1


class RuntimeCache:
    def __init__(self):
        self.lines = []

    def deserialize(self, blob):
        self.lines = bytes(blob).splitlines()
        return True

    def serialize(self):
        return memoryview(b"\n".join(self.lines))


class RuntimeConfig:
    cuda_graph_strategy = None

    def create_runtime_cache(self):
        return RuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class Context(tensorrt.Context):
    def __init__(self, session, config):
        super().__init__(session)
        self.config = config

    def run(self):
        super().run()
        kernel = repr(sorted(self.shapes.items())).encode()
        if kernel not in self.config.cache.lines:
            self.config.cache.lines.append(kernel)
            print("compiled a kernel", file=sys.stderr)


class Engine(tensorrt.Engine):
    def create_runtime_config(self):
        return RuntimeConfig()

    def create_execution_context(self, config):
        assert config.cuda_graph_strategy == CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return Context(self.session, config)


class Runtime(tensorrt.Runtime):
    def deserialize_cuda_engine(self, plan):
        engine = super().deserialize_cuda_engine(plan)
        return engine and Engine(engine.session)
