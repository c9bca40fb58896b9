// The packages of OpenAI and Anthropic for Node, against the server at BASE.
import assert from "node:assert";
import OpenAI from "openai";
import Anthropic from "@anthropic-ai/sdk";
const base = process.env.BASE;
const question = [{ role: "user", content: "What is the capital of France?" }];
const openai = new OpenAI({ baseURL: `${base}/v1`, apiKey: "none", maxRetries: 0 });
const asked = { model: "demo", messages: question, temperature: 0, max_completion_tokens: 8 };
const chat = await openai.chat.completions.create(asked);
const text = chat.choices[0].message.content;
assert.match(text, /Paris/);
let streamed = "";
for await (const chunk of await openai.chat.completions.create({ ...asked, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(streamed, text);
const runner = openai.chat.completions.stream(asked);
assert.equal(await runner.finalContent(), text);
const completion = await openai.completions.create({ model: "demo", prompt: "The capital of France is", max_tokens: 3, temperature: 0 });
assert.match(completion.choices[0].text, /Paris/);
for await (const model of openai.models.list()) assert.equal((await openai.models.retrieve(model.id)).id, model.id);
await assert.rejects(openai.chat.completions.create({ ...asked, temperature: -1 }), OpenAI.BadRequestError);
const response = await openai.responses.create({ model: "demo", input: "What is the capital of France?", temperature: 0, max_output_tokens: 16 });
assert.match(response.output_text, /Paris/);
const anthropic = new Anthropic({ baseURL: base, apiKey: "none", maxRetries: 0 });
const wanted = { model: "demo", max_tokens: 8, temperature: 0, messages: question };
const message = await anthropic.messages.create(wanted);
assert.match(message.content[0].text, /Paris/);
const final = await anthropic.messages.stream(wanted).finalMessage();
assert.deepEqual(final.content, message.content);
assert.ok((await anthropic.messages.countTokens({ model: "demo", messages: question })).input_tokens > 0);
await assert.rejects(anthropic.messages.create({ ...wanted, max_tokens: -1 }), Anthropic.BadRequestError);
for await (const model of anthropic.models.list()) assert.ok(model.display_name);
