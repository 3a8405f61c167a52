// `node program.mjs CLIENT URL`: a JSON line with a deed in, a JSON line with its outcome out, with one of the
// npm clients and nothing else. The same as tests/clients/programs, whose __main__.py says how it is spoken.

import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";

const [clientName, url] = process.argv.slice(2);
const words = JSON.parse(readFileSync(new URL("../questions.json", import.meta.url)));
const asks = (text) => [{ role: "user", content: text }];
const tools = [{ type: "function", function: words.tool }];
const schemaOf = (name, schema) => ({ type: "json_schema", json_schema: { name, schema } });

function check(holds, what) {
  if (!holds) throw new Error(`expected ${what}`);
}

/** The first piece that says something; the stream stays open. */
async function first(stream, says) {
  const pieces = stream[Symbol.asyncIterator]();
  for (;;) {
    const { value, done } = await pieces.next();
    check(!done, "a piece that says something");
    if (says(value)) return;
  }
}

async function withOpenAI() {
  const { default: OpenAI } = await import("openai");
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  const completions = client.chat.completions;
  const says = (chunk) => chunk.choices[0]?.delta.content;
  return {
    async chat({ model }) {
      const asked = { model, messages: asks(words.ask), max_tokens: words.max_tokens };
      const answer = await completions.create(asked);
      check(answer.usage.completion_tokens > 0, "usage");
      return answer.choices[0].message.content;
    },
    async stream({ model }) {
      const asked = { model, messages: asks(words.ask), max_tokens: words.max_tokens };
      const stream = await completions.create({ ...asked, stream: true });
      const chunks = [];
      for await (const chunk of stream) chunks.push(chunk);
      check(chunks.some((chunk) => chunk.choices[0]?.finish_reason), "a finish reason");
      return chunks.map(says).filter(Boolean);
    },
    async tools({ model }) {
      const asked = { model, tools, max_tokens: words.tool_max_tokens, temperature: 0 };
      const messages = asks(words.weather);
      const choice = (await completions.create({ ...asked, messages })).choices[0];
      check(choice.finish_reason === "tool_calls", "tool_calls");
      const call = choice.message.tool_calls[0];
      messages.push(choice.message, { role: "tool", tool_call_id: call.id, content: words.tool_says });
      const briefly = { ...asked, messages, max_tokens: words.max_tokens };
      const then = (await completions.create(briefly)).choices[0].message.content;
      return [call.function.name, JSON.parse(call.function.arguments), then];
    },
    async embeddings({ model }) {
      const answer = await client.embeddings.create({ model, input: words.texts });
      return answer.data.map((one) => Array.from(one.embedding));
    },
    async structured({ model }) {
      const asked = { model, messages: asks(words.pick), max_tokens: words.schema_max_tokens, temperature: 0 };
      const answer = await completions.create({ ...asked, response_format: schemaOf("Colour", words.schema) });
      return JSON.parse(answer.choices[0].message.content);
    },
    async models() {
      const listed = [];
      for await (const model of client.models.list()) listed.push(model.id);
      check((await client.models.retrieve(listed[0])).id === listed[0], "the first model");
      return listed;
    },
    async unknown() {
      try {
        await completions.create({ model: words.unknown, messages: asks(words.ask) });
      } catch (error) {
        return [[error.constructor.name], error.status, error.code];
      }
      throw new Error("answered");
    },
    async begin({ model }) {
      const asked = { model, messages: asks(words.endless), max_tokens: words.endless_max_tokens };
      const response_format = schemaOf("Numbers", words.numbers);
      const stream = await completions.create({ ...asked, response_format, stream: true });
      await first(stream, says);
      return () => stream.controller.abort();
    },
  };
}

async function withOllama() {
  const { Ollama } = await import("ollama");
  const client = new Ollama({ host: url });
  const says = (line) => line.message.content;
  return {
    async chat({ model }) {
      const options = { num_predict: words.max_tokens };
      const answer = await client.chat({ model, messages: asks(words.ask), options });
      check(answer.done && answer.model === model, "the end of an answer, by the model asked for");
      const said = await client.generate({ model, prompt: "The sky is", options: { num_predict: 4 } });
      check(said.response, "a completion");
      return says(answer);
    },
    async stream({ model }) {
      const options = { num_predict: words.max_tokens };
      const stream = await client.chat({ model, messages: asks(words.ask), options, stream: true });
      const lines = [];
      for await (const line of stream) lines.push(line);
      check(lines.at(-1).done && lines.at(-1).eval_count, "a last line with its counters");
      return lines.map(says).filter(Boolean);
    },
    async tools({ model }) {
      const options = { num_predict: words.tool_max_tokens, temperature: 0 };
      const messages = asks(words.weather);
      const { message } = await client.chat({ model, messages, tools, options });
      const call = message.tool_calls[0].function;
      messages.push(message, { role: "tool", tool_name: call.name, content: words.tool_says });
      options.num_predict = words.max_tokens;
      const then = await client.chat({ model, messages, tools, options });
      return [call.name, call.arguments, says(then)];
    },
    async embeddings({ model }) {
      const alone = await client.embeddings({ model, prompt: words.texts[0] });
      const { embeddings } = await client.embed({ model, input: words.texts });
      check(alone.embedding.length === embeddings[0].length, "vectors of one length");
      return embeddings;
    },
    async structured({ model }) {
      const options = { num_predict: words.schema_max_tokens, temperature: 0 };
      const asked = { model, messages: asks(words.pick), format: words.schema, options };
      return JSON.parse(says(await client.chat(asked)));
    },
    async models() {
      const listed = (await client.list()).models.map((model) => model.model);
      const loaded = (await client.ps()).models.map((model) => model.model);
      check(loaded.length && loaded.every((name) => listed.includes(name)), "loaded ones among those listed");
      check((await client.show({ model: listed[0] })).capabilities.length, "capabilities");
      return listed;
    },
    async unknown() {
      try {
        await client.chat({ model: words.unknown, messages: asks(words.ask) });
      } catch (error) {
        return [[error.name], error.status_code, error.error];
      }
      throw new Error("answered");
    },
    async begin({ model }) {
      const asked = { model, messages: asks(words.endless), format: words.numbers };
      const stream = await client.chat({ ...asked, stream: true });
      await first(stream, says);
      return () => stream.abort();
    },
  };
}

const client = await { openai: withOpenAI, ollama: withOllama }[clientName]();
for await (const line of createInterface({ input: process.stdin })) {
  const { deed, ...order } = JSON.parse(line);
  let outcome;
  try {
    if (deed === "begin") {
      client.leave = await client.begin(order);
      outcome = { value: null };
    } else {
      outcome = { value: (await client[deed](order)) ?? null };
    }
  } catch (error) {
    outcome = { trouble: String(error?.stack ?? error) };
  }
  process.stdout.write(`${JSON.stringify(outcome)}\n`);
}
process.exit(0);
