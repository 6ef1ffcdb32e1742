_base_ = './sa_r18-d8_1xb4-1k_fusion-shapes-128x128.py'
model = dict(type='CAREncoderDecoder', car=dict(channels=64))
