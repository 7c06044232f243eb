"""A count of how often the blocks of networks are compiled."""

from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from dit.compilation import compile_network


class CompileCounter:
    """Compiles networks by a backend that runs graphs as they are, and counts those of forward and backward passes."""

    def __init__(self):
        self.forward = self.backward = 0
        self.backend = aot_autograd(fw_compiler=self.count("forward"), bw_compiler=self.count("backward"))

    def count(self, name):
        def compile(graph, inputs):
            setattr(self, name, getattr(self, name) + 1)
            return make_boxed_func(graph.forward)

        return compile

    def compile(self, network):
        """Compile the blocks of a network, and return it."""
        compile_network(network, self.backend)
        return network
