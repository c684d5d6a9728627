// What transformers.js makes of an exported folder: node transformers.cjs FOLDER INPUTS KIND
const fs = require('fs');
const path = require('path');
const T = require('@huggingface/transformers');

const [folder, inputsFile, kind] = process.argv.slice(2);
T.env.allowRemoteModels = false;
T.env.localModelPath = path.dirname(folder) + '/';
const name = path.basename(folder);
const inputs = JSON.parse(fs.readFileSync(inputsFile));
const options = { dtype: 'fp32' };
const list = (x) => Array.from(x.data);
const int64 = (values, shape) => new T.Tensor('int64', BigInt64Array.from(values.map(BigInt)), shape);

async function square() {
  const { pixels, shape, ids, ids_shape, image, labels, template } = inputs;
  const [Whole, Vision, Text, output] = {
    clip: [T.CLIPModel, T.CLIPVisionModelWithProjection, T.CLIPTextModelWithProjection, 0],
    siglip: [T.SiglipModel, T.SiglipVisionModel, T.SiglipTextModel, 1],
  }[kind];
  const pixel_values = new T.Tensor('float32', Float32Array.from(pixels), shape);
  const input_ids = int64(ids, ids_shape);
  const whole = await (await Whole.from_pretrained(name, options))({ pixel_values, input_ids });
  const vision = await (await Vision.from_pretrained(name, options))({ pixel_values });
  const text = await (await Text.from_pretrained(name, options))({ input_ids });
  const classify = await T.pipeline('zero-shot-image-classification', name, options);
  const found = await classify(image, labels, { hypothesis_template: template });
  return {
    logits: list(whole.logits_per_image),
    image_features: list(output ? vision.pooler_output : vision.image_embeds),
    text_features: list(output ? text.pooler_output : text.text_embeds),
    found,
  };
}

// It has no class for Siglip2: the base class runs each file, here on several batches in turn.
async function naflex() {
  const load = (file) =>
    T.PreTrainedModel.from_pretrained(name, { ...options, model_file_name: file });
  const [whole, vision, text] = [await load('model'), await load('vision_model'), await load('text_model')];
  const input_ids = int64(inputs.ids, inputs.ids_shape);
  const results = [];
  for (const { pixels, shape, mask, grid } of inputs.batches) {
    const images = {
      pixel_values: new T.Tensor('float32', Float32Array.from(pixels), shape),
      pixel_attention_mask: int64(mask, shape.slice(0, 2)),
      spatial_shapes: int64(grid, [shape[0], 2]),
    };
    results.push({
      logits: list((await whole({ ...images, input_ids })).logits_per_image),
      image_features: list((await vision(images)).pooler_output),
      text_features: list((await text({ input_ids })).pooler_output),
    });
  }
  return results;
}

(kind === 'siglip2' ? naflex() : square()).then((x) => console.log(JSON.stringify(x)));
