// Vercel's ai: OpenAI's provider on responses and on chat completions, and the one for compatible servers.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateObject, generateText, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const url = process.argv[2];
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "lightllmd",
  baseURL: `${url}/v1`,
  supportsStructuredOutputs: true,
});
const city = z.object({ name: z.string().max(12) });
const weather = tool({
  description: "The weather in a city",
  inputSchema: z.object({ city: z.string().max(12) }),
  execute: async ({ city }) => `sunny in ${city}`,
});

for (const model of [openai("demo"), openai.chat("demo"), compatible("demo")]) {
  const providerOptions = { openai: { parallelToolCalls: false }, lightllmd: { parallel_tool_calls: false } };
  const asked = { model, temperature: 0, maxOutputTokens: 60, maxRetries: 0, providerOptions };
  const prompt = "What is the capital of France?";
  const whole = await generateText({ ...asked, prompt });
  assert.match(whole.text, /Paris/);
  assert.ok(whole.usage.outputTokens > 0);
  const stream = streamText({ ...asked, prompt });
  let text = "";
  for await (const part of stream.textStream) text += part;
  assert.equal(text, whole.text);
  assert.equal(await stream.finishReason, "stop");

  const { object } = await generateObject({ ...asked, schema: city, prompt });
  assert.deepEqual(Object.keys(object), ["name"]);
  const objects = streamObject({ ...asked, schema: city, prompt });
  for await (const _ of objects.partialObjectStream);
  assert.deepEqual(await objects.object, object);

  const called = await generateText({
    ...asked,
    prompt: "What is the weather in Paris?",
    tools: { weather },
    toolChoice: { type: "tool", toolName: "weather" },
  });
  assert.equal(called.toolCalls[0].toolName, "weather");
  assert.match(called.toolResults[0].output, /sunny in/);
  // The conversation with the call and its result goes on.
  const after = await generateText({
    ...asked,
    messages: [{ role: "user", content: "What is the weather in Paris?" }, ...called.response.messages],
    tools: { weather },
  });
  assert.ok(after.text || after.toolCalls.length);
  const calling = streamText({ ...asked, prompt: "What is the weather?", tools: { weather }, toolChoice: "required" });
  const kinds = [];
  for await (const part of calling.fullStream) kinds.push(part.type);
  assert.ok(kinds.includes("tool-call") && kinds.includes("tool-result"), kinds.join());
}

for (const model of [openai.textEmbeddingModel("demo"), compatible.textEmbeddingModel("demo")]) {
  const { embeddings } = await embedMany({ model, values: ["Paris", "a tree"] });
  assert.equal(embeddings[0].length, embeddings[1].length);
  assert.notDeepEqual(embeddings[0], embeddings[1]);
}

await assert.rejects(
  generateText({ model: openai("demo"), prompt: "x", tools: { s: openai.tools.webSearch() }, maxRetries: 0 }),
  /web_search.*not available here/,
);
console.log("Vercel's ai works");
