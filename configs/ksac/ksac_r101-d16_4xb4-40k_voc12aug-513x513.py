_base_ = './ksac_r50-d16_4xb4-40k_voc12aug-513x513.py'
model = dict(pretrained='open-mmlab://resnet101_v1c', backbone=dict(depth=101))
