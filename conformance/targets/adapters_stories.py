"""Stories in AdapterHub's `adapters`: a transformer of one layer, and what is done to it by the methods of its models.

Training is of whatever `train_adapter` leaves to be trained in the model itself; the prediction head, which it always
trains, belongs to no adapter. An average is `average_adapter` with its strategy `linear`, and weights as they are.
"""

from collections.abc import Sequence

import torch

from refpeft.conformance.targets.adapters import Session, default_dtype
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.models import decoder_of, output, refused
from refpeft.conformance.targets.spec_stories import RATE, last
from refpeft.conformance.targets.tensors import tensor


class Story(Session):
    def train(self) -> None:
        """A step of gradient descent on what is trained of the adapters that are active."""
        self.model.train_adapter(self.active)
        self.model.eval()
        self.model.zero_grad()
        out = output(self.model, self.case.arrays["ids"], **decoder_of(self.case))
        out.backward(tensor(last(self.case.arrays["dout"], out.shape)))
        torch.optim.SGD([p for p in self.model.base_model.parameters() if p.requires_grad], lr=RATE).step()

    def load_as(self, adapter: str, file: str) -> Arrays | None:
        how = {"load_as": adapter, "use_safetensors": True, "with_head": False}
        try:
            with default_dtype(self.case.meta["dtype"]):
                return refused(lambda: self.model.load_adapter(str(self.folder / file), **how))
        finally:
            self.model.eval()

    def average(self, adapter: str, of: Sequence[str], weights: Sequence[float]) -> None:
        with default_dtype(self.case.meta["dtype"]):
            self.model.average_adapter(adapter, list(of), list(weights), "linear", normalize_weights=False)
        self.model.eval()
