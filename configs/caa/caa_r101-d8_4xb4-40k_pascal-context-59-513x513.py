_base_ = './caa_r101-d16_4xb4-40k_pascal-context-59-513x513.py'
model = dict(
    backbone=dict(
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        multi_grid=(4, 8, 16)))  # 4 times 1, 2, 4
