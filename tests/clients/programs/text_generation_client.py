"""The package text-generation against the server at BASE, which speaks TGI's format."""

import os

from text_generation import Client
from text_generation.errors import ValidationError

client = Client(os.environ["BASE"], timeout=60)
prompt = "The three largest planets are"
whole = client.generate(prompt, max_new_tokens=4, decoder_input_details=True, top_n_tokens=2)
assert (len(whole.details.tokens), len(whole.details.top_tokens)) == (4, 4)
assert "".join(token.text for token in whole.details.prefill) == prompt
events = list(client.generate_stream(prompt, max_new_tokens=4))
assert "".join(event.token.text for event in events) == events[-1].generated_text == whole.generated_text
assert client.generate(prompt, max_new_tokens=4, stop_sequences=[whole.generated_text[:3]]).details.finish_reason
messages = [{"role": "user", "content": "What is the capital of France?"}]
chat = client.chat(messages, max_tokens=8, temperature=0.01, seed=1)
assert "Paris" in chat.choices[0].message.content
deltas = list(client.chat(messages, max_tokens=8, temperature=0.01, seed=1, stream=True))
assert "".join(delta.choices[0].delta.content for delta in deltas) == chat.choices[0].message.content
try:
    client.generate("x" * 100000, max_new_tokens=1)
except ValidationError:
    pass
else:
    raise AssertionError("a prompt that is too long was answered")
