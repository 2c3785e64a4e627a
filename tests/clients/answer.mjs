// Answers what the tests ask: node answer.mjs CLIENT PLACE [DTYPE], texts or inputs as JSON on standard input.
import { readFileSync } from "node:fs";

const [client, place, dtype] = process.argv.slice(2);
const asked = JSON.parse(readFileSync(0, "utf8"));
const answers = [];
if (client === "transformers.js") {
  const { pipeline } = await import("@huggingface/transformers");
  const classify = await pipeline("text-classification", place, { dtype });
  for (const text of asked) answers.push(await classify(text, { top_k: null }));
} else if (client === "onnxruntime-node") {
  const { InferenceSession, Tensor } = await import("onnxruntime-node");
  const session = await InferenceSession.create(place);
  for (const ids of asked) {
    const shape = [1, ids.length];
    const input_ids = new Tensor("int64", ids.map(BigInt), shape);
    const attention_mask = new Tensor("int64", ids.map(() => 1n), shape);
    const { logits } = await session.run({ input_ids, attention_mask });
    answers.push(Array.from(logits.data));
  }
} else {
  const { InferenceClient } = await import("@huggingface/inference");
  const endpoint = new InferenceClient().endpoint(place);
  for (const parameters of asked) {
    answers.push(await endpoint.textClassification({ inputs: "a film", parameters }));
  }
}
console.log(JSON.stringify(answers));
