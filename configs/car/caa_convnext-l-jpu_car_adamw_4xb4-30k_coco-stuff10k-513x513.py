_base_ = [
    '../_base_/models/caa_convnext-l-jpu.py',  # CAA with ConvNeXt-L and JPU
    '../_base_/datasets/coco-stuff10k_513x513_brightness.py',  # 171 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_adamw.py'  # AdamW, lr 6e-5, wd 0.01, 30k
]
custom_imports = dict(imports=['mmseg_fusion', 'mmpretrain.models'], allow_failed_imports=False)
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
# Class-aware regularization in the place of the convolution behind the concatenation, bottleneck.
model = dict(
    type='CAREncoderDecoder',
    car=dict(channels=256),
    data_preprocessor=data_preprocessor,
    decode_head=dict(
        dropout_ratio=0.,
        num_classes=171),
    auxiliary_head=None)
