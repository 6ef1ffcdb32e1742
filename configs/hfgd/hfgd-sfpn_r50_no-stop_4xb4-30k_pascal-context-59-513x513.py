_base_ = './sfpn_r50_4xb4-30k_pascal-context-59-513x513.py'
# Both parts, and every stop-gradient removed.
model = dict(decode_head=dict(guidance=True, axial_attention=True, stop_gradient=False))
