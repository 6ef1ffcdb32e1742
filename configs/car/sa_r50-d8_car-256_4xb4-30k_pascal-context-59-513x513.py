_base_ = './sa_r50-d8_4xb4-30k_pascal-context-59-513x513.py'
# Section 4.4.2.3: the last convolution gives 256 channels, the rest keeps its 512.
model = dict(
    type='CAREncoderDecoder',
    car=dict(),
    decode_head=dict(channels=256, attention_channels=512))
