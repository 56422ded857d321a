"""Records NeMo's stateless prediction network and HAT joint into heads.safetensors beside it.

    python record_heads.py        with the Python of an environment with NeMo

Of each form: weights, outputs of training, the loss with its gradients, greedy tokens and frames of
random encoder frames. Nothing of this project is imported.
"""

import json
from pathlib import Path

import torch
from nemo.collections.asr.losses.rnnt import RNNTLoss
from nemo.collections.asr.modules import HATJoint, RNNTDecoder, RNNTJoint
from nemo.collections.asr.modules.rnnt import StatelessTransducerDecoder
from nemo.collections.asr.parts.submodules.rnnt_greedy_decoding import GreedyRNNTInfer
from safetensors.torch import save_file

V, D, H, J = 7, 10, 9, 6  # tokens, widths of encoder, prediction network and joint
FORMS = {  # context size, 0: an LSTM; normalised; HAT
    "stateless_1": (1, False, False),
    "stateless_2": (2, True, False),
    "stateless_3": (3, True, False),
    "hat": (0, False, True),
    "stateless_hat": (2, True, True),
}


def record(name: str, context: int, norm: bool, hat: bool, tensors: dict) -> None:
    torch.manual_seed(len(name))
    net = {"pred_hidden": H, "pred_rnn_layers": 1, "dropout": 0.0}
    mode = "layer" if norm else None
    if context:
        decoder = StatelessTransducerDecoder(net, V, context, mode)
    else:
        decoder = RNNTDecoder(net, V, blank_as_pad=True)
    sizes = {"encoder_hidden": D, "pred_hidden": H, "joint_hidden": J, "activation": "relu"}
    joint = (HATJoint if hat else RNNTJoint)(sizes, V)
    for parameter in joint.parameters():
        parameter.data = torch.randn(parameter.shape)
    if not hat:
        joint.joint_net[-1].bias.data[-1] += 3.0  # or blanks are rare
    encoded = torch.randn(2, D, 8)
    targets, target_lengths = torch.randint(0, V, (2, 5)), torch.tensor([5, 3])
    lengths = torch.tensor([8, 6])
    predicted, _, _ = decoder(targets=targets, target_length=target_lengths)
    logits = joint.joint(encoded.transpose(1, 2), predicted.transpose(1, 2))
    loss = RNNTLoss(num_classes=V, reduction="mean_batch", loss_name="warprnnt_numba")
    value = loss(
        log_probs=logits, targets=targets, input_lengths=lengths, target_lengths=target_lengths
    )
    value.backward()
    for part, module in (("decoder", decoder), ("joint", joint)):
        for key, parameter in module.named_parameters():
            tensors[f"{name}/weights/{part}.{key}"] = parameter.detach()
            tensors[f"{name}/gradients/{part}.{key}"] = parameter.grad
    tensors[f"{name}/encoded"] = encoded.transpose(1, 2).contiguous()
    tensors |= {f"{name}/targets": targets, f"{name}/target_lengths": target_lengths}
    tensors |= {f"{name}/lengths": lengths, f"{name}/loss": value.detach()}
    tensors[f"{name}/predicted"] = predicted.detach().transpose(1, 2).contiguous()
    tensors[f"{name}/log_probs"] = logits.detach().log_softmax(-1)
    decoder.eval(), joint.eval()
    infer = GreedyRNNTInfer(decoder, joint, V, max_symbols_per_step=3)
    (found,) = infer(encoder_output=encoded, encoded_lengths=lengths)
    for i, hypothesis in enumerate(found):
        tensors[f"{name}/tokens{i}"] = torch.as_tensor(hypothesis.y_sequence).long()
        tensors[f"{name}/frames{i}"] = torch.as_tensor(hypothesis.timestamp).long()


def main() -> None:
    import nemo

    tensors: dict = {}
    for name, form in FORMS.items():
        record(name, *form, tensors)
    about = {"nemo": nemo.__version__, "forms": json.dumps(FORMS)}
    save_file(tensors, Path(__file__).parent / "heads.safetensors", about)


if __name__ == "__main__":
    main()
