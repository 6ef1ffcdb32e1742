"""A file of tools/deployment/export_onnx.py --argmax, run without PyTorch or MMSegmentation."""

import json

import cv2
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession('model.onnx', providers=['CPUExecutionProvider'])
about = session.get_modelmeta().custom_metadata_map
height, width = session.get_inputs()[0].shape[2:]

picture = cv2.imread('image.png')  # blue, green, red
image = cv2.resize(picture, (width, height))
image = image[..., ::-1] if about['channels'] == 'RGB' else image
image = (image - np.array(json.loads(about['mean']))) / np.array(json.loads(about['std']))
image = image.transpose(2, 0, 1)[None].astype(np.float32)  # (1, 3, H, W)
labels = session.run(['labels'], {'image': image})[0][0]
labels = cv2.resize(labels, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)

classes = json.loads(about.get('classes', '[]'))
for label, count in zip(*np.unique(labels, return_counts=True)):
    name = classes[label] if classes else f'class {label}'
    print(f'{name}: {100 * count / labels.size:.1f} %')
cv2.imwrite('labels.png', labels)
