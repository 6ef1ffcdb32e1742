_base_ = './caa_efficientnet-b7-d8_4xb4-40k_pascal-context-59-513x513.py'
model = dict(backbone=dict(output_stride=16))
