_base_ = './caa_r101-d16_4xb4-40k_pascal-context-59-513x513.py'
model = dict(decode_head=dict(gate_channels=64))
