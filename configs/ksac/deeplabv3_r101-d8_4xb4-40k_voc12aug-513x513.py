_base_ = './deeplabv3_r50-d16_4xb4-40k_voc12aug-513x513.py'
# Output stride 8 doubles the rates.
model = dict(
    pretrained='open-mmlab://resnet101_v1c',
    backbone=dict(depth=101, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    decode_head=dict(dilations=(1, 12, 24, 36)))
