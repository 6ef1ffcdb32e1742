# Registers mmseg_fusion, and meets the quirks of the installed versions, whoever reads the config:
# this project's tools, MMSegmentation's own, init_model, MMSegInferencer.
# A config that needs another import repeats the list: lists are replaced, not joined.
custom_imports = dict(imports=['mmseg_fusion'], allow_failed_imports=False)

default_scope = 'mmseg'
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))

log_level = 'INFO'
log_processor = dict(by_epoch=False)
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='SegLocalVisualizer', vis_backends=vis_backends, name='visualizer')

load_from = None
resume = False

tta_model = dict(type='SegTTAModel')
