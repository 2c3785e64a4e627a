// Answer texts in Node with an exported adapter. From the top of the repository:
//
//     lora-sentiment export adapters/imdb_small out --format onnx
//     npm install @huggingface/transformers
//     node examples/onnx_in_node.mjs ./out "A lovely film."
//
// transformers.js loses the last [SEP] of a text that it cuts. The card in `out` has code that cuts as training did.
import { pipeline } from "@huggingface/transformers";

const [folder, ...texts] = process.argv.slice(2);
const classify = await pipeline("text-classification", folder, { dtype: "fp32" });
for (const text of texts) {
  const [{ label, score }] = await classify(text);
  console.log(label, score.toFixed(4), text);
}
