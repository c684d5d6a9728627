// What transformers.js makes of an exported folder: node transformers.cjs FOLDER INPUTS KIND
const fs = require('fs');
const path = require('path');
const T = require('@huggingface/transformers');

const [folder, inputsFile, kind] = process.argv.slice(2);
T.env.allowRemoteModels = false;
T.env.localModelPath = path.dirname(folder) + '/';
const name = path.basename(folder);
const { pixels, shape, ids, ids_shape, image, labels, template } = JSON.parse(
  fs.readFileSync(inputsFile),
);
const [Whole, Vision, Text, output] = {
  clip: [T.CLIPModel, T.CLIPVisionModelWithProjection, T.CLIPTextModelWithProjection, 0],
  siglip: [T.SiglipModel, T.SiglipVisionModel, T.SiglipTextModel, 1],
}[kind];

(async () => {
  const options = { dtype: 'fp32' };
  const pixel_values = new T.Tensor('float32', Float32Array.from(pixels), shape);
  const input_ids = new T.Tensor('int64', BigInt64Array.from(ids.map(BigInt)), ids_shape);
  const whole = await (await Whole.from_pretrained(name, options))({ pixel_values, input_ids });
  const vision = await (await Vision.from_pretrained(name, options))({ pixel_values });
  const text = await (await Text.from_pretrained(name, options))({ input_ids });
  const classify = await T.pipeline('zero-shot-image-classification', name, options);
  const found = await classify(image, labels, { hypothesis_template: template });
  const list = (x) => Array.from(x.data);
  console.log(
    JSON.stringify({
      logits: list(whole.logits_per_image),
      image_features: list(output ? vision.pooler_output : vision.image_embeds),
      text_features: list(output ? text.pooler_output : text.text_embeds),
      found,
    }),
  );
})();
