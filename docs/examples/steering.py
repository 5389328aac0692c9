"""Stop Llama at a layer, leave the device, steer, fork, and compare the branches.

    python docs/examples/steering.py                                          # a small Llama, no GPU needed
    python docs/examples/steering.py --model meta-llama/Llama-2-7b-hf --budget-gb 8

The steering vector is the difference of the residual stream on two prompts at one layer (activation addition). With
seeded random weights the words mean nothing, but every step is the same as with a real checkpoint.
"""

import argparse

import torch

import djinn_core as djinn

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="small-llama", help="a folder, a cached hub id, or a name in config/models")
parser.add_argument("--budget-gb", type=float, default=0.04, help="device memory for everything; less than the model")
parser.add_argument("--new-tokens", type=int, default=12)
options = parser.parse_args()

# 1. A model larger than its memory budget. It is a Hugging Face model; only the weights' place is unusual.
model = djinn.load(options.model, budget_bytes=int(options.budget_gb * 1e9))
runtime, depth = model.djinn.runtime, model.config.num_hidden_layers
layer = depth // 2
print(f"{options.model}: {depth} layers, {len(model.djinn.plan.streamed)} of them stream; stop after layer {layer}")

generator = torch.Generator().manual_seed(0)
prompt, liked, disliked = torch.randint(3, model.config.vocab_size, (3, 1, 24), generator=generator)


# 2. What the model holds in mind after this layer, for two prompts. The layers behind it never run.
def residual_stream(ids: torch.Tensor) -> torch.Tensor:
    with djinn.open_session(model, max_length=64) as probe:
        return probe.forward(ids, stop_after=layer).hidden_states()[0, -1]


vector = residual_stream(liked) - residual_stream(disliked)

# 3. Stop the prompt itself there. The session is now a thing that can be kept, shared, moved and edited.
session = djinn.open_session(model, max_length=64)
stopped = session.forward(prompt, stop_after=layer)
assert isinstance(stopped, djinn.Checkpoint)
print(f"stopped: {stopped}")

# 4. Nobody computes while a person thinks, so the device memory goes to others.
session.pause(release=True)
session.wait_until("released", timeout_s=60)
assert session.id not in runtime.memory().kv_by_session
print(runtime.memory())

# 5. Fork, and resume both from exactly there: one as it was, one steered at the last position.
branch = session.fork()
plain_logits = session.resume()
steered_logits = branch.resume(edits=[djinn.Add(4.0 * vector, positions=[-1])])
plain, steered = (s.generate(options.new_tokens)[0].tolist() for s in (session, branch))

# 6. Compare the branches.
log_p, log_q = (torch.log_softmax(logits[0].float(), dim=-1) for logits in (plain_logits, steered_logits))
divergence = torch.sum(log_p.exp() * (log_p - log_q)).item()
agree = sum(a == b for a, b in zip(plain, steered, strict=True))
print(f"plain    {plain}\nsteered  {steered}")
print(f"KL(plain || steered) of the next token: {divergence:.4f}; {agree} of {len(plain)} tokens agree")
assert divergence > 0, "the edit changed nothing"

# 7. The checkpoint was not consumed and not changed: resumed once more, it gives the same logits to the bit.
again = session.resume(stopped)
assert torch.equal(again, plain_logits), "a resume of the unedited checkpoint differs"
print("the unedited checkpoint still gives the first answer, bit for bit")
runtime.close()
