_base_ = './caa_r101-d16_4xb4-40k_pascal-context-59-513x513.py'
model = dict(
    pretrained='open-mmlab://resnet50_v1c',
    backbone=dict(depth=50))
