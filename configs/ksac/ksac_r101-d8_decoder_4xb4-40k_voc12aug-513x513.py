_base_ = './ksac_r50-d16_4xb4-40k_voc12aug-513x513.py'
# Output stride 8 doubles the rates; the decoder takes the first stage's output, stride 4.
model = dict(
    pretrained='open-mmlab://resnet101_v1c',
    backbone=dict(depth=101, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    decode_head=dict(dilations=(12, 24, 36), c1_in_channels=256, c1_channels=48))
